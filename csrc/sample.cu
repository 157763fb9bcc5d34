// `meal_fast.ops.sample` for CUDA tensors: one block of threads a row. The arithmetic is in
// sample.cuh. Bound through LibTorch's stable ABI, so that one build serves several versions of
// torch; the caller gives the outputs and the stream. Never run on a GPU so far.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

// Before the arithmetic, which looks them up by the type alone.
namespace meal_fast {
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
}  // namespace meal_fast

#include "sample.cuh"

namespace meal_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// A block. Sums are added in one order, so that two runs give the same bits.
struct Block {
  __device__ int32_t rank() const { return threadIdx.x; }
  __device__ int32_t size() const { return kThreads; }

  template <typename T, typename Join>
  __device__ T join(T value, Join both) {
    __shared__ T parts[kWarps];
    for (int lanes = 16; lanes > 0; lanes /= 2)
      value = both(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    __syncthreads();  // the last join may still be reading
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = parts[0];
    for (int warp = 1; warp < kWarps; ++warp) value = both(value, parts[warp]);
    return value;
  }

  __device__ double sum(double value) {
    return join(value, [](double a, double b) { return a + b; });
  }
  __device__ float max(float value) {
    return join(value, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ int32_t max(int32_t value) {
    return join(value, [](int32_t a, int32_t b) { return a > b ? a : b; });
  }
  __device__ int32_t min(int32_t value) {
    return join(value, [](int32_t a, int32_t b) { return a < b ? a : b; });
  }

  // The sum up to and with this thread's value, and the sum of all.
  __device__ double running_sum(double value, double& total) {
    __shared__ double parts[kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, value, lanes);
      if (lane >= lanes) value += other;
    }
    __syncthreads();
    if (lane == 31) parts[warp] = value;
    __syncthreads();
    double before = 0;
    total = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) before = total;
      total += parts[i];
    }
    return before + value;
  }
};

template <typename Logit>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const Logit* logits, int64_t row_stride, int64_t stride, int32_t columns,
                  const int64_t* row_id, const int64_t* position, Options options, int64_t* token,
                  float* logp, float* truncated_logp) {
  const int64_t r = blockIdx.x;
  Block team;
  const Row<Logit> row{logits + r * row_stride, stride, columns};
  const Drawn drawn = draw(team, row, options, row_id[r], position[r]);
  if (threadIdx.x == 0) {
    token[r] = drawn.token;
    logp[r] = drawn.logp;
    truncated_logp[r] = drawn.truncated_logp;
  }
}

using torch::stable::Tensor;

template <typename Logit>
void launch(const Tensor& logits, const Tensor& row, const Tensor& position, const Tensor& token,
            const Tensor& logp, const Tensor& truncated, const Options& options,
            cudaStream_t stream) {
  sample_kernel<Logit><<<static_cast<unsigned>(logits.size(0)), kThreads, 0, stream>>>(
      static_cast<const Logit*>(logits.data_ptr()), logits.stride(0), logits.stride(1),
      static_cast<int32_t>(logits.size(1)), static_cast<const int64_t*>(row.data_ptr()),
      static_cast<const int64_t*>(position.data_ptr()), options,
      static_cast<int64_t*>(token.data_ptr()), static_cast<float*>(logp.data_ptr()),
      static_cast<float*>(truncated.data_ptr()));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("meal_fast sample: ") + cudaGetErrorString(error));
}

// `kind` is the type of the logits: 0 float32, 1 bfloat16, 2 float16.
void sample(const Tensor logits, const Tensor row, const Tensor position, Tensor token,
            Tensor logp, Tensor truncated, int64_t kind, int64_t seed, double scale, bool greedy,
            int64_t top_k, double top_p, double min_p, int64_t stream) {
  const Options options{static_cast<uint64_t>(seed), static_cast<float>(scale), greedy,
                        static_cast<int32_t>(top_k), top_p, static_cast<float>(min_p)};
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (logits.size(0) == 0) return;
  if (kind == 0)
    launch<float>(logits, row, position, token, logp, truncated, options, queue);
  else if (kind == 1)
    launch<__nv_bfloat16>(logits, row, position, token, logp, truncated, options, queue);
  else
    launch<__half>(logits, row, position, token, logp, truncated, options, queue);
}

}  // namespace
}  // namespace meal_fast

STABLE_TORCH_LIBRARY(meal_fast_cuda, m) {
  m.def(
      "sample(Tensor logits, Tensor row, Tensor position, Tensor(a!) token, Tensor(b!) logp, "
      "Tensor(c!) truncated, int kind, int seed, float scale, bool greedy, int top_k, "
      "float top_p, float min_p, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(meal_fast_cuda, CUDA, m) {
  m.impl("sample", TORCH_BOX(&meal_fast::sample));
}
