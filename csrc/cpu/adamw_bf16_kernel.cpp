#include "cpu/adamw_bf16_kernel.h"

#include "common/vec_math.h"

namespace rlhf::RLHF_ISA {
namespace {

using Words = Bits<float>;

// 16 random bits a lane for each tensor, from three products of 32 bits. Philox4x32-10 takes 20 of 64 bits for 128
// random ones, and vectors multiply to 64 bits in every second lane only.
struct RandomBits {
  Words param, exp_avg, exp_avg_sq;

  // `low`: the position of each element, modulo 2^32; `key`: of the seed, the step and the position's upper half.
  RLHF_INLINE RandomBits(Words low, uint64_t key) {
    Words x = low + static_cast<uint32_t>(key);
    x = (x ^ (x >> 17)) * 0xed5ad4bbu + static_cast<uint32_t>(key >> 32);
    x = (x ^ (x >> 11)) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    x = x ^ (x >> 14);
    param = x >> 16;
    exp_avg = x & 0xffffu;
    exp_avg_sq = (param + exp_avg) & 0xffffu;
  }
};

// The n first lanes of x + bits, cut to bfloat16. inf has no low half to carry into; NaN is kept from carrying.
RLHF_INLINE void store_rounded(BFloat16* p, Vec<float> x, Words bits, int64_t n) {
  const Words rounded = ((Words)x + bits) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0u, Halves);
  if (__builtin_expect(n >= kLanes<float>, 1)) return store_raw(p, halves);
  for (int i = 0; i < n; ++i) p[i].bits = halves[i];
}

// Elements [begin, end), whose positions have one upper half.
template <class G>
RLHF_INLINE void update_part(const AdamWArgs& args, int64_t begin, int64_t end) {
  BFloat16* const params = static_cast<BFloat16*>(args.param);
  BFloat16* const exp_avgs = static_cast<BFloat16*>(args.exp_avg);
  BFloat16* const exp_avg_sqs = static_cast<BFloat16*>(args.exp_avg_sq);
  const G* const grads = static_cast<const G*>(args.grad);
  const AdamWArgs by = args;  // a store could change what a reference points at
  const uint64_t key = mix64(by.key + static_cast<uint64_t>(begin >> 32));
  Words position;
  for (int i = 0; i < kLanes<float>; ++i) position[i] = static_cast<uint32_t>(begin) + i;
  for (int64_t i = begin; i < end; i += kLanes<float>, position += static_cast<uint32_t>(kLanes<float>)) {
    const int64_t n = end - i;
    const Vec<float> grad = load(grads + i, n, 0.0f) * by.grad_factor;
    const Vec<float> old_avg = load(exp_avgs + i, n, 0.0f);
    const Vec<float> avg = old_avg + (grad - old_avg) * by.exp_avg_rate;
    const Vec<float> avg_sq = load(exp_avg_sqs + i, n, 0.0f) * by.exp_avg_sq_kept + (grad * grad) * by.exp_avg_sq_rate;
    const Vec<float> ratio = avg / (sqrt(avg_sq) * by.root_scale + by.eps);
    const Vec<float> param = load(params + i, n, 0.0f) * by.decay - by.step_size * ratio;
    const RandomBits bits(position, key);
    store_rounded(params + i, param, bits.param, n);
    store_rounded(exp_avgs + i, avg, bits.exp_avg, n);
    store_rounded(exp_avg_sqs + i, avg_sq, bits.exp_avg_sq, n);
  }
}

template <class G>
void update(const AdamWArgs& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t next = ((begin >> 32) + 1) << 32, to = next < end ? next : end;
    update_part<G>(args, begin, to);
    begin = to;
  }
}

}  // namespace

const AdamWTable adamw_bf16_table = {update<BFloat16>, update<float>};

}  // namespace rlhf::RLHF_ISA
