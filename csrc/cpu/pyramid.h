// Interface between bindings.cpp and the tiers of the pyramid kernels. Plain data only.
#pragma once

#include <stdint.h>

namespace vk {

constexpr int PYRAMID_LEVELS = 4;

// One level of a batch, in memory of its own or as columns of a token matrix. Value (b, c, t, y, x) lies at
//   b * b + c * c + (t / pt) * t + (t % pt) * ti + (y / ph) * y + (y % ph) * yi + (x / pw) * x + x % pw
// A level in memory of its own has pt = ph = 1 and pw = its width.
struct LevelView {
  void* data;  // null where there is none
  int bf16;
  int64_t b, c, t, y, x, ti, yi, pt, ph, pw;
};

struct LevelSize {
  int64_t t, h, w;
};

// Levels run coarse to fine. Which fields a kernel uses is said beside it.
struct PyramidArgs {
  int threads, stream;  // stream: store past the caches
  int kind, ft;         // filters; 2 if time is pooled too, else 1
  int levels, active;   // levels there are, and how many of them (the coarsest) take part
  int64_t batch, channels;
  LevelSize size[PYRAMID_LEVELS];
  int64_t tile_t, tile_y;  // positions of the coarsest level per tile; 0 = chosen here
  LevelView volume;        // what is decomposed or merged
  LevelView in[3][PYRAMID_LEVELS], out[3][PYRAMID_LEVELS];
  const float* table;  // coefficients of (sample, level); null where there are none
  int64_t table_b, table_s;
  const uint8_t* mask;  // of (sample, level); null: all take part
  int64_t mask_b;
  float scale[PYRAMID_LEVELS];  // of each level's values
  int philox;                   // noise from the generator: else from in[1], or none
  uint32_t key0, key1, offset, first_sample;
  float* loss;  // of the loss: where it goes; of its adjoint: its gradient, or null
};

// 0, or 1 when scratch memory could not be had.
#define VK_PYRAMID_TIER(tier)                            \
  namespace tier {                                       \
  int pyramid_analysis(const PyramidArgs&);              \
  int pyramid_analysis_adjoint(const PyramidArgs&);      \
  int pyramid_synthesis(const PyramidArgs&);             \
  int pyramid_synthesis_adjoint(const PyramidArgs&);     \
  int pyramid_mix(const PyramidArgs&);                   \
  int pyramid_mix_adjoint(const PyramidArgs&);           \
  int pyramid_step(const PyramidArgs&);                  \
  int pyramid_step_adjoint(const PyramidArgs&);          \
  int pyramid_loss(const PyramidArgs&);                  \
  int pyramid_loss_backward(const PyramidArgs&);         \
  int pyramid_stage(const PyramidArgs&);                 \
  int pyramid_stage_adjoint(const PyramidArgs&);         \
  int pyramid_transition(const PyramidArgs&);            \
  int pyramid_transition_adjoint(const PyramidArgs&);    \
  int pyramid_normals(const PyramidArgs&);               \
  }
VK_PYRAMID_TIER(portable)
VK_PYRAMID_TIER(avx2)
VK_PYRAMID_TIER(avx512)

}  // namespace vk
