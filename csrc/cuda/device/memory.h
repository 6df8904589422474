// Memory: 16-byte and single accesses to global memory, and shared memory behind handles. Kernels hold no pointer into shared memory: what
// they read and write there goes through the primitives below, which the models check for races.
#pragma once
#include "platform.h"

namespace vk {

struct alignas(16) Words {  // 16 bytes
  u32 w[4];
};

// Elements of T in the block's shared memory, from byte `at` on. at must be a multiple of 16 for the 16-byte accesses.
template <typename T>
struct Shared {
  u32 at;
  VK_DEVICE Shared operator+(i32 n) const { return {at + u32(n * i32(sizeof(T)))}; }
};

#ifdef __CUDACC__

extern __shared__ __align__(1024) u8 vk_shared_memory[];

template <typename T>
VK_DEVICE Shared<T> shared_at(u32 byte) {
  return {u32(__cvta_generic_to_shared(vk_shared_memory)) + byte};
}
VK_DEVICE Words load16(const void* p) {
  Words v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
  return v;
}
VK_DEVICE void store16(void* p, Words v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
template <typename T>
VK_DEVICE T load(const T* p) {
  return *p;
}
template <typename T>
VK_DEVICE void store(T* p, T v) {
  *p = v;
}
VK_DEVICE Words load16(Shared<u8> p) {
  Words v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(p.at) : "memory");
  return v;
}
VK_DEVICE void store16(Shared<u8> p, Words v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.at), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
VK_DEVICE u32 load4(Shared<u8> p) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(p.at) : "memory");
  return v;
}
VK_DEVICE void store4(Shared<u8> p, u32 v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(p.at), "r"(v) : "memory"); }

#else

template <typename T>
inline Shared<T> shared_at(u32 byte) {
  return {byte};
}
inline Words load16(const void* p VK_AT) {
  Words v;
  model::read_global(&v, p, 16, at);
  return v;
}
inline void store16(void* p, Words v VK_AT) { model::write_global(p, &v, 16, at); }
template <typename T>
inline T load(const T* p VK_AT) {
  T v;
  model::read_global(&v, p, sizeof(T), at);
  return v;
}
template <typename T>
inline void store(T* p, T v VK_AT) {
  model::write_global(p, &v, sizeof(T), at);
}
inline Words load16(Shared<u8> p VK_AT) {
  Words v;
  model::read_shared(&v, p.at, 16, at);
  return v;
}
inline void store16(Shared<u8> p, Words v VK_AT) { model::write_shared(p.at, &v, 16, at); }
inline u32 load4(Shared<u8> p VK_AT) {
  u32 v;
  model::read_shared(&v, p.at, 4, at);
  return v;
}
inline void store4(Shared<u8> p, u32 v VK_AT) { model::write_shared(p.at, &v, 4, at); }

#endif

template <typename T>
VK_DEVICE Shared<u8> bytes_of(Shared<T> p) {
  return {p.at};
}

}  // namespace vk
