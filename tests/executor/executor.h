// Functional models of the device primitives, for running the CUDA sources on a CPU: one fiber per CUDA thread, shared memory that knows who
// wrote and read every two bytes, and what is asynchronous on a device finished as late as the PTX ISA allows. See executor.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define VK_MODEL_KERNEL extern "C" void

namespace vk {
namespace model {

struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

uint32_t thread_index();
uint32_t thread_count();
uint32_t block_index();

void read_global(void* to, const void* from, uint32_t bytes, Where);
void write_global(void* to, const void* from, uint32_t bytes, Where);
void read_shared(void* to, uint32_t from, uint32_t bytes, Where);
void write_shared(uint32_t to, const void* from, uint32_t bytes, Where);

void copy_async(uint32_t to, const void* from, uint32_t bytes, Where);
void prefetch(const void* from, uint32_t bytes, Where);
void copies_commit();
void copies_wait(int still_under_way);

float shuffle_xor(float value, uint32_t mask, Where);
uint32_t ballot(bool value, Where);
void warp_barrier(Where);
void barrier(uint32_t id, uint32_t threads, Where);

void load_matrices(uint32_t (&w)[4], uint32_t row, bool transposed, Where);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat, Where);

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
// Compute capability 9.0 on: executor_async.cpp (barriers in shared memory, copies of boxes, clusters), executor_warpgroup.cpp (products).
uint32_t cluster_rank();
void cluster_barrier(Where);
void mbarrier_make(uint32_t byte, uint32_t arrivals, Where);
void mbarriers_made(Where);
// At the barrier of block `rank` of the cluster; expected: bytes that its phase waits for besides.
void mbarrier_arrive(uint32_t byte, uint32_t rank, uint32_t expected, Where);
void mbarrier_wait(uint32_t byte, uint32_t parity, Where);
void async_fence(Where);
// blocks: 0, this block alone; else a bit for each block of the cluster. map: the harness's encoding of a tensor map.
void copy_box(uint16_t blocks, uint32_t to, const unsigned long long* map, std::initializer_list<int> first, uint32_t done, Where);
void registers(int count, bool more, Where);
void products_begin(Where);
void products_commit(Where);
void products_wait(int still_under_way, Where);
// c: n / 2 sums of this lane; a: its left operand in registers, or null and described by a_bits.
void warpgroup_product(float* c, int n, const uint32_t* a, unsigned long long a_bits, bool a_across, unsigned long long b_bits, bool b_across,
                       bool keep, bool bfloat, Where);

uint16_t round_bf16(float f);
uint16_t round_f16(float f);
float widen_f16(uint16_t h);
inline float exp2_of(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }
// fmaxf: the number, where one of the two is NaN.
inline float max_of(float a, float b) { return std::fmax(a, b); }

}  // namespace model
}  // namespace vk
