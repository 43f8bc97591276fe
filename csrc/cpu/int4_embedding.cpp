// int4 embedding: check -> choose the ISA's kernel -> run it (embedding.h).
#include "int4_embedding.h"

#include "embedding.h"
#include "isa.h"

namespace lissom {
namespace {

#if defined(LISSOM_X86)
constexpr Int4EmbeddingKernel kTable[kIsaCount] = {int4_embedding_scalar, int4_embedding_avx2,
                                                   int4_embedding_avx512vnni};
#else
constexpr Int4EmbeddingKernel kTable[kIsaCount] = {int4_embedding_scalar, nullptr, nullptr};
#endif

}  // namespace

int64_t int4_embedding(const Int4EmbeddingArgs& args, int threads) {
  LISSOM_CHECK(args.width == 0 || args.group >= args.width || (args.group >= 16 && args.group % 16 == 0),
               "int4_embedding: group of ", args.group, " elements; use 32, 64, 128 or the whole row");
  return run_embedding("int4_embedding", kTable[static_cast<int>(active_isa())], args, threads);
}

}  // namespace lissom
