#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

Index threadIdx, blockIdx, gridDim;
extern "C" int64_t emulated_launches = 0;

namespace {

constexpr size_t STACK = 256 * 1024;

// A point where fibers meet; it opens when all that are expected have arrived.
struct Barrier {
  int arrived = 0, generation = 0;
};

// Starts by setcontext; from then on jumps, which unlike swapcontext make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool started, done;
  const Barrier* barrier;  // waits until it opens, if not null
  int generation;

  bool runnable() const { return !done && (barrier == nullptr || barrier->generation != generation); }
};

struct Warp {
  Barrier barrier;
  int alive, operation;
  uint32_t words[32];
};

jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
int block_alive;
const std::function<void()>* body;
const char* failure;

void suspend() {
  if (_setjmp(fibers[threadIdx.x].jump) == 0) _longjmp(scheduler, 1);
}

void resume(int thread) {
  threadIdx.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

void meet(Barrier& barrier, const int& expected) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  ++barrier.arrived == expected ? open(barrier) : suspend();
}

// A thread that has returned is no longer waited for.
void leave(Barrier& barrier, int& expected) {
  if (--expected > 0 && barrier.arrived == expected) open(barrier);
}

void run_fiber() {
  (*body)();
  fibers[threadIdx.x].done = true;
  leave(warps[threadIdx.x / 32].barrier, warps[threadIdx.x / 32].alive);
  leave(block_barrier, block_alive);
  suspend();
}

void start_block(int threads) {
  block_barrier = {};
  block_alive = threads;
  warps.assign((threads + 31) / 32, Warp{});
  for (auto& warp : warps) warp.alive = 32;
  for (auto& fiber : fibers) {
    fiber.started = fiber.done = false;
    fiber.barrier = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

// Resumes every fiber that can go on, of the slow warp or of the others; false if there was none.
bool resume_all(const std::vector<int>& order, int slow_warp, bool slow) {
  bool any = false;
  for (int thread : order) {
    if ((thread / 32 == slow_warp) != slow || !fibers[thread].runnable()) continue;
    any = true;
    resume(thread);
  }
  return any;
}

// One warp of the block runs only when no other can: what it has still to read, the others overwrite unless told to
// wait.
void run_block(std::vector<int>& order, std::mt19937& random) {
  start_block(static_cast<int>(order.size()));
  const int slow_warp = random() % warps.size();
  while (block_alive > 0) {
    std::shuffle(order.begin(), order.end(), random);
    if (!resume_all(order, slow_warp, false) && !resume_all(order, slow_warp, true)) {
      throw std::runtime_error("deadlock: threads of a block wait at different barriers");
    }
    if (failure != nullptr) throw std::runtime_error(failure);
  }
}

}  // namespace

void __syncthreads() { meet(block_barrier, block_alive); }

void __threadfence() {}

uint32_t emulated_shuffle(uint32_t value, int source, int operation) {
  const int lane = threadIdx.x % 32;
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.alive != 32) failure = "a shuffle over all lanes after some have returned";
  if (warp.barrier.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) failure = "lanes of a warp meet in different shuffles";
  warp.words[lane] = value;
  meet(warp.barrier, warp.alive);
  const uint32_t result = warp.words[source];
  meet(warp.barrier, warp.alive);  // nobody overwrites a word that is still to be read
  return result;
}

void run_blocks(int blocks, int threads, const std::function<void()>& kernel) {
  std::mt19937 random(blocks);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  fibers.resize(threads);
  body = &kernel;
  failure = nullptr;
  gridDim.x = blocks;
  ++emulated_launches;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(order, random);
}

// torch asks for a device and a stream; on a CPU there is neither.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}
