// What needs no filter: noise on given levels, the guided Euler step, the loss, and the adjoint of each. Levels are cut into runs:
// stretches of consecutive values where every view has them so, else rows.
#include "cpu/pyramid_mix.h"

namespace vk {
namespace VK_ISA {
namespace {

constexpr int64_t RUN = 16384;  // values of a run; the order in which the loss adds does not depend on threads

struct Runs {
  bool flat[PYRAMID_LEVELS];
  int64_t length[PYRAMID_LEVELS], per_sample[PYRAMID_LEVELS], first[PYRAMID_LEVELS + 1];

  // `by_count`: runs of a fixed number of values whatever the layout, which `gather` reads.
  Runs(const PyramidArgs& a, int levels, bool by_count = false) {
    first[0] = 0;
    for (int s = 0; s < levels; ++s) {
      const LevelSize& z = a.size[s];
      flat[s] = true;
      for (int k = 0; k < 3; ++k)
        flat[s] = flat[s] && is_flat(a.in[k][s], z, a.channels, true) && is_flat(a.out[k][s], z, a.channels, true);
      const int64_t values = a.channels * z.t * z.h * z.w;
      length[s] = flat[s] || by_count ? least(RUN, values) : z.w;
      per_sample[s] = (values + length[s] - 1) / length[s];
      first[s + 1] = first[s] + a.batch * per_sample[s];
    }
    count = first[levels];
  }
  int64_t count;
};

// One run: n values of level s of sample b, beginning at value `element` of the sample, which is (c, t, y, 0) unless flat.
struct Run {
  int s;
  int64_t b, c, t, y, element, n;
  bool flat;
};

VK_INLINE Run run_at(const PyramidArgs& a, const Runs& runs, int64_t i) {
  Run r;
  r.s = 0;
  while (i >= runs.first[r.s + 1]) ++r.s;
  const LevelSize& z = a.size[r.s];
  const int64_t in_level = i - runs.first[r.s];
  r.b = in_level / runs.per_sample[r.s];
  r.element = in_level % runs.per_sample[r.s] * runs.length[r.s];
  r.n = least(runs.length[r.s], a.channels * z.t * z.h * z.w - r.element);
  r.flat = runs.flat[r.s];
  const int64_t row = r.element / z.w;
  r.y = row % z.h, r.t = row / z.h % z.t, r.c = row / (z.h * z.t);
  return r;
}

// Where the run begins in a view: for a flat run counted from the sample's first value.
VK_INLINE int64_t begin(const LevelView& v, const Run& r) { return r.flat ? r.b * v.b + r.element : offset_of(v, r.b, r.c, r.t, r.y); }

// Values i .. i + n of a run that may reach over several rows.
VK_INLINE const float* gather(const LevelView& v, const LevelSize& z, const Run& r, int64_t i, int64_t n, float* buffer) {
  if (r.flat) return load_run(v, begin(v, r), i, n, true, buffer);
  for (int64_t done = 0; done < n;) {
    const int64_t at = r.element + i + done, row = at / z.w, x = at % z.w, m = least(n - done, z.w - x);
    const int64_t o = offset_of(v, r.b, row / (z.h * z.t), row / z.h % z.t, row % z.h);
    const float* p = load_run(v, o, x, m, false, buffer + done);
    if (p != buffer + done) memcpy(buffer + done, p, static_cast<size_t>(m) * 4);
    done += m;
  }
  return buffer;
}

template <class Body>
int each_run(const PyramidArgs& a, int levels, const Body& body, bool by_count = false) {
  const Runs runs(a, levels, by_count);
  int64_t values = 0;
  for (int s = 0; s < levels; ++s) values += a.batch * a.channels * a.size[s].t * a.size[s].h * a.size[s].w;
  const int threads = values < 32768 || a.threads < 1 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < runs.count; ++i) body(run_at(a, runs, i), i);
    if (a.stream) stream_end();
  }
  return 0;
}

struct Buffer {
  alignas(64) float data[CHUNK + SLACK];
};

}  // namespace

// in[0] (levels as they are) -> out[0], out[1]; see mix_level. Rows of one level at a time.
int pyramid_mix(const PyramidArgs& a) {
  return each_run(a, a.levels, [&](const Run& r, int64_t) {
    const LevelView &x = a.in[0][r.s], &given = a.in[1][r.s], &z = a.out[0][r.s], &v = a.out[1][r.s];
    if (!z.data) return;
    const bool masked = is_masked(a, r.b, r.s);
    const NoiseKey key = noise_key(a, r.b, r.s);
    const float* k = coefficients(a, r.b, r.s);
    const F16 scale = set1(a.scale[r.s]), alpha = set1(k[0]), sigma = set1(k[1]), da = set1(k[2]), ds = set1(k[3]);
    Buffer xs, es, zs, vs;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      const float *from = xs.data, *eps = es.data;
      if (!masked) {
        from = load_own(x, begin(x, r), i, n, r.flat, xs.data);
        eps = a.philox ? normals(key, r.element + i, n, es.data) : load_own(given, begin(given, r), i, n, r.flat, es.data);
      }
      for (int64_t j = 0; j < n; j += LANES) {
        if (masked) {
          store(zs.data + j, zero()), store(vs.data + j, zero());
          continue;
        }
        const F16 value = mul(scale, load(from + j)), e = load(eps + j);
        store(zs.data + j, fma(alpha, value, mul(sigma, e)));
        store(vs.data + j, fma(da, value, mul(ds, e)));
      }
      store_run(z, begin(z, r), i, n, r.flat, zs.data, a.stream);
      if (v.data) store_run(v, begin(v, r), i, n, r.flat, vs.data, a.stream);
    }
  });
}

// in[0], in[1] (gradients) -> out[0] = scale (alpha dz + d_alpha dv), zero where masked.
int pyramid_mix_adjoint(const PyramidArgs& a) {
  return each_run(a, a.levels, [&](const Run& r, int64_t) {
    const bool masked = is_masked(a, r.b, r.s);
    const float* k = coefficients(a, r.b, r.s);
    const float weight[2] = {a.scale[r.s] * k[0], a.scale[r.s] * k[2]};
    Buffer gs, to;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      for (int64_t j = 0; j < n; j += LANES) store(to.data + j, zero());
      for (int p = 0; p < 2; ++p) {
        const LevelView& g = a.in[p][r.s];
        if (masked || !g.data) continue;
        const float* from = load_own(g, begin(g, r), i, n, r.flat, gs.data);
        for (int64_t j = 0; j < n; j += LANES) store(to.data + j, fma(set1(weight[p]), load(from + j), load(to.data + j)));
      }
      store_run(a.out[0][r.s], begin(a.out[0][r.s], r), i, n, r.flat, to.data, a.stream);
    }
  });
}

// z = in[0], cond = in[1], uncond = in[2] (or none): out[0] = z + dt (u + w (c - u)) for the levels that have velocities; out[1], the
// next model input, has the new z of the `active` levels (z as it is where there is no velocity) and zeros of the others.
int pyramid_step(const PyramidArgs& a) {
  return each_run(a, a.levels, [&](const Run& r, int64_t) {
    const LevelView &z = a.in[0][r.s], &cond = a.in[1][r.s], &uncond = a.in[2][r.s];
    const float* k = coefficients(a, r.b, r.s);
    const F16 dt = set1(k[0]), guidance = set1(k[1]);
    Buffer zs, cs, us, to;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      if (!z.data) {
        for (int64_t j = 0; j < n; j += LANES) store(to.data + j, zero());
      } else {
        const float* from = load_own(z, begin(z, r), i, n, r.flat, zs.data);
        const float* vc = cond.data ? load_own(cond, begin(cond, r), i, n, r.flat, cs.data) : nullptr;
        const float* vu = vc && uncond.data ? load_own(uncond, begin(uncond, r), i, n, r.flat, us.data) : nullptr;
        for (int64_t j = 0; j < n; j += LANES) {
          F16 x = load(from + j);
          if (vc) {
            F16 v = load(vc + j);
            if (vu) {
              const F16 u = load(vu + j);
              v = fma(guidance, sub(v, u), u);
            }
            x = fma(dt, v, x);
          }
          store(to.data + j, x);
        }
      }
      for (int p = 0; p < 2; ++p) {
        const LevelView& out = a.out[p][r.s];
        if (!out.data) continue;
        if (p == 1 && r.s >= a.active)
          for (int64_t j = 0; j < n; j += LANES) store(to.data + j, zero());
        store_run(out, begin(out, r), i, n, r.flat, to.data, p == 0 && out.data == z.data ? 0 : a.stream);
      }
    }
  });
}

// in[0], in[1] = gradients of the state and of the next input: out[0] = their sum g, out[1] = w (dt g), out[2] = (1 - w) (dt g); without
// out[2] there is no guidance, and out[1] = dt g.
int pyramid_step_adjoint(const PyramidArgs& a) {
  return each_run(a, a.levels, [&](const Run& r, int64_t) {
    const float* k = coefficients(a, r.b, r.s);
    const float weight[3] = {1.f, a.out[2][0].data ? k[1] : 1.f, 1.f - k[1]};
    Buffer gs, sum, to;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      for (int64_t j = 0; j < n; j += LANES) store(sum.data + j, zero());
      for (int p = 0; p < 2; ++p) {
        const LevelView& g = a.in[p][r.s];
        if (!g.data) continue;
        const float* from = load_own(g, begin(g, r), i, n, r.flat, gs.data);
        for (int64_t j = 0; j < n; j += LANES) store(sum.data + j, add(load(sum.data + j), load(from + j)));
      }
      for (int p = 0; p < 3; ++p) {
        const LevelView& out = a.out[p][r.s];
        if (!out.data) continue;
        const F16 dt = set1(p ? k[0] : 1.f), share = set1(weight[p]);
        for (int64_t j = 0; j < n; j += LANES) store(to.data + j, mul(share, mul(dt, load(sum.data + j))));
        store_run(out, begin(out, r), i, n, r.flat, to.data, a.stream);
      }
    }
  });
}

// in[0] = prediction, in[1] = target -> a sum per run; out of these, in order, the mean of every (sample, level) into
// table[b * table_b + s] (written here), and out of the means the loss. A masked level is not read; its mean is 0.
int pyramid_loss(const PyramidArgs& a) {
  const Runs runs(a, a.active, true);
  double* sums = static_cast<double*>(malloc(static_cast<size_t>(runs.count) * sizeof(double)));
  if (!sums) return 1;
  each_run(a, a.active, [&](const Run& r, int64_t index) {
    double total = 0;
    const LevelView &p = a.in[0][r.s], &q = a.in[1][r.s];
    Buffer ps, qs;
    for (int64_t i = 0; i < r.n && !is_masked(a, r.b, r.s); i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i), whole = n / LANES * LANES;
      const float* x = gather(p, a.size[r.s], r, i, n, ps.data);
      const float* y = gather(q, a.size[r.s], r, i, n, qs.data);
      F16 acc = zero();
      for (int64_t j = 0; j < whole; j += LANES) {
        const F16 d = sub(load(x + j), load(y + j));
        acc = fma(d, d, acc);
      }
      double part = sum(acc);
      for (int64_t j = whole; j < n; ++j) part += static_cast<double>(x[j] - y[j]) * (x[j] - y[j]);
      total += part;
    }
    sums[index] = total;
  }, true);
  float* means = const_cast<float*>(a.table);
  double loss = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int s = 0; s < a.levels; ++s) {
      double total = 0;
      const LevelSize& z = a.size[s];
      for (int64_t i = 0; i < runs.per_sample[s < a.active ? s : 0] && s < a.active; ++i)
        total += sums[runs.first[s] + b * runs.per_sample[s] + i];
      const float mean = static_cast<float>(total / static_cast<double>(a.channels * z.t * z.h * z.w));
      means[b * a.table_b + s * a.table_s] = mean, loss += mean;
    }
  *a.loss = static_cast<float>(loss / static_cast<double>(a.batch));
  free(sums);
  return 0;
}

// out[0] = 2 (dloss / B + dmean) / n (prediction - target), zero where masked; dloss in `loss`, dmean in `table`, either may be absent.
int pyramid_loss_backward(const PyramidArgs& a) {
  return each_run(a, a.levels, [&](const Run& r, int64_t) {
    const LevelView &p = a.in[0][r.s], &q = a.in[1][r.s], &out = a.out[0][r.s];
    const bool masked = is_masked(a, r.b, r.s);
    const LevelSize& size = a.size[r.s];
    const float share = (a.loss ? *a.loss / static_cast<float>(a.batch) : 0.f) + (a.table ? *coefficients(a, r.b, r.s) : 0.f);
    const F16 factor = set1(2 * share / static_cast<float>(a.channels * size.t * size.h * size.w));
    Buffer ps, qs, to;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      if (masked) {
        for (int64_t j = 0; j < n; j += LANES) store(to.data + j, zero());
      } else {
        const float* x = load_own(p, begin(p, r), i, n, r.flat, ps.data);
        const float* y = load_own(q, begin(q, r), i, n, r.flat, qs.data);
        for (int64_t j = 0; j < n; j += LANES) store(to.data + j, mul(factor, sub(load(x + j), load(y + j))));
      }
      store_run(out, begin(out, r), i, n, r.flat, to.data, a.stream);
    }
  });
}

// out[0][0] = the normals of a level (philox = 1), or the generator's words as they are (philox = 2). For tests and for initial states.
int pyramid_normals(const PyramidArgs& a) {
  return each_run(a, 1, [&](const Run& r, int64_t) {
    const NoiseKey key = noise_key(a, r.b, static_cast<int>(a.table_s));
    Buffer to;
    for (int64_t i = 0; i < r.n; i += CHUNK) {
      const int64_t n = least(CHUNK, r.n - i);
      const float* from = to.data;
      if (a.philox == 1) {
        from = normals(key, r.element + i, n, to.data);
      } else {
        const int64_t first = (r.element + i) / 4, skip = r.element + i - 4 * first;
        for (int64_t j = 0; j < skip + n; j += NORMALS) {
          U16 w[4];
          philox16(key, static_cast<uint32_t>(first + j / 4), w);
          uint32_t lane[4][LANES];
          for (int k = 0; k < 4; ++k) memcpy(lane[k], &w[k], sizeof lane[k]);
          for (int k = 0; k < NORMALS; ++k) memcpy(to.data + j + k, &lane[k % 4][k / 4], 4);
        }
        from = to.data + skip;
      }
      store_run(a.out[0][0], begin(a.out[0][0], r), i, n, r.flat, from, 0);
    }
  });
}

}  // namespace VK_ISA
}  // namespace vk
