// Enough of CUDA to run kernels on a CPU: each thread of a block is a fiber, blocks run one after another. Barriers and
// shuffles suspend a fiber until its peers arrive; the order in which fibers resume is hostile, so that a missing
// barrier shows.
#pragma once

#include <math.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  int x;
};
extern Index threadIdx, blockIdx, gridDim;

void __syncthreads();
void __threadfence();
uint32_t emulated_shuffle(uint32_t value, int source, int operation);
void run_blocks(int blocks, int threads, const std::function<void()>& kernel);

enum { DOWN = 1, XOR = 2, FROM = 3 };

inline uint32_t __shfl_down_sync(unsigned, uint32_t value, int step) {
  const int lane = threadIdx.x % 32;
  return emulated_shuffle(value, lane + step < 32 ? lane + step : lane, DOWN * 64 + step);
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int step) {
  return emulated_shuffle(value, threadIdx.x % 32 ^ step, XOR * 64 + step);
}

inline uint32_t __shfl_sync(unsigned, uint32_t value, int source) {
  return emulated_shuffle(value, source, FROM * 64 + source);
}

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) double2 {
  double x, y;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using cudaError_t = int;
enum { cudaSuccess = 0, cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 132;
  return cudaSuccess;
}
