// int8 embedding: choose the ISA's kernel -> check and run it (embedding.h).
#include "int8_embedding.h"

#include "embedding.h"
#include "isa.h"

namespace lissom {
namespace {

#if defined(LISSOM_X86)
constexpr Int8EmbeddingKernel kTable[kIsaCount] = {int8_embedding_scalar, int8_embedding_avx2,
                                                   int8_embedding_avx512vnni};
#else
constexpr Int8EmbeddingKernel kTable[kIsaCount] = {int8_embedding_scalar, nullptr, nullptr};
#endif

}  // namespace

int64_t int8_embedding(const Int8EmbeddingArgs& args, int threads) {
  return run_embedding("int8_embedding", kTable[static_cast<int>(active_isa())], args, threads);
}

}  // namespace lissom
