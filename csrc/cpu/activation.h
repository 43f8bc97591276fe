// Fused activation functions on 16 lanes. The sequence of operations is the contract (every ISA and
// python/lissom/reference/numerics.py repeat it, so bits agree); sources and error bounds are given there.
//
// Included once per ISA, inside that ISA's namespace: not a stand-alone header.

inline F16 exp(F16 x) {
  x = max(set1(-87.0f), x);  // operand order: NaN in x wins
  x = min(set1(88.0f), x);
  const F16 n = round(mul(x, set1(static_cast<float>(1.4426950408889634))));
  F16 r = fma(n, set1(-0.693145751953125f), x);
  r = fma(n, set1(static_cast<float>(-1.428606765330187e-06)), r);
  F16 p = set1(static_cast<float>(1.0 / 5040));
  p = fma(p, r, set1(static_cast<float>(1.0 / 720)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 120)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 24)));
  p = fma(p, r, set1(static_cast<float>(1.0 / 6)));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return mul(p, power_of_two(to_int(n)));
}

// x * sigmoid(u)
inline F16 sigmoid_times(F16 x, F16 u) { return div(x, add(set1(1.0f), exp(negate(u)))); }

inline F16 gelu(F16 x) {
  const F16 z = mul(abs(x), set1(static_cast<float>(0.7071067811865476)));
  const F16 t = div(set1(1.0f), fma(set1(0.5f), z, set1(1.0f)));
  F16 p = set1(static_cast<float>(0.17087277));
  p = fma(p, t, set1(static_cast<float>(-0.82215223)));
  p = fma(p, t, set1(static_cast<float>(1.48851587)));
  p = fma(p, t, set1(static_cast<float>(-1.13520398)));
  p = fma(p, t, set1(static_cast<float>(0.27886807)));
  p = fma(p, t, set1(static_cast<float>(-0.18628806)));
  p = fma(p, t, set1(static_cast<float>(0.09678418)));
  p = fma(p, t, set1(static_cast<float>(0.37409196)));
  p = fma(p, t, set1(static_cast<float>(1.00002368)));
  p = fma(p, t, set1(static_cast<float>(-1.26551223)));
  const F16 half_erfc = mul(mul(t, exp(fma(negate(z), z, p))), set1(0.5f));
  return mul(x, select_negative(x, half_erfc, sub(set1(1.0f), half_erfc)));
}

inline F16 gelu_tanh(F16 x) {
  const F16 square = mul(x, x);
  const F16 inner = fma(mul(square, set1(static_cast<float>(0.044715))), x, x);
  return sigmoid_times(x, mul(inner, set1(static_cast<float>(1.5957691216057308))));
}

template <Activation kActivation>
inline F16 activate(F16 x) {
  switch (kActivation) {
    case Activation::kRelu: return max(set1(0.0f), x);
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kSilu: return sigmoid_times(x, x);
    default: return x;
  }
}
