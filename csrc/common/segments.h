// Frame structure of grid attention: which rows form a query tile, and which keys it sees.
//
// Tokens are numbered per region: text 0..n_text, video 0..F*N (frame-major). Keys are grouped into panels of 16 consecutive tokens
// of one region, text panels first. A query tile holds rows of one frame (of several when frames are tiny), so what it sees is a
// short list of panels with one 16-bit mask per frame of the tile: visibility, dead frames, kv_len and ragged ends all become bits,
// and a panel is computed only if some bit is set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/isa.h"

namespace vk {
namespace VK_ISA {

constexpr int PANEL = 16;

struct Frames {
  int64_t n_frames, frame_len, n_text;
  int text_visible, text_front;
  const int32_t *q_ptr, *q_runs;  // CSR of key-frame runs (first, count) per query frame
  const int32_t *k_ptr, *k_runs;  // ... of query-frame runs per key frame
  const uint8_t* valid;           // [F] of this batch item, or null
  const int32_t* kv_len;          // [F] of this batch item, or null
  int64_t text_keys;              // text tokens that are keys in this batch item

  int64_t video() const { return n_frames * frame_len; }
  int64_t text_panels() const { return (n_text + PANEL - 1) / PANEL; }
  int64_t panels() const { return text_panels() + (video() + PANEL - 1) / PANEL; }
  // Position in the sequence of a token of a region.
  int64_t token(bool text, int64_t i) const { return text == (text_front != 0) ? i : i + (text ? video() : n_text); }
  // First position and number of tokens of a panel.
  int64_t panel_token(int64_t p, int* count) const {
    const int64_t tp = text_panels();
    const bool text = p < tp;
    const int64_t first = (text ? p : p - tp) * PANEL, left = (text ? n_text : video()) - first;
    *count = static_cast<int>(left < PANEL ? left : PANEL);
    return token(text, first);
  }
};

// How query rows are cut into tiles. Rows of a group of query heads that share keys are stacked: row = head * tokens + token.
struct Tiling {
  int64_t frames_per_tile, tokens_text;
  int64_t text_chunks, text_rows, video_chunks, video_rows, tiles, capacity;

  void init(const Frames& f, int64_t group, int64_t max_rows, int64_t step) {
    // Frames shorter than a panel are taken several at a time: one row alone would still cost a whole register block.
    frames_per_tile = f.frame_len >= PANEL ? 1 : 2 * PANEL / f.frame_len;
    if (frames_per_tile > f.n_frames) frames_per_tile = f.n_frames;
    tokens_text = f.n_text;
    split(group * f.n_text, max_rows, step, &text_chunks, &text_rows);
    split(group * frames_per_tile * f.frame_len, max_rows, step, &video_chunks, &video_rows);
    tiles = text_chunks + (f.n_frames + frames_per_tile - 1) / frames_per_tile * video_chunks;
    capacity = text_rows > video_rows ? text_rows : video_rows;
  }

 private:
  static void split(int64_t rows, int64_t max_rows, int64_t step, int64_t* chunks, int64_t* size) {
    *chunks = (rows + max_rows - 1) / max_rows;
    *size = *chunks ? ((rows + *chunks - 1) / *chunks + step - 1) / step * step : 0;
    if (*chunks) *chunks = (rows + *size - 1) / *size;
  }
};

struct Tile {
  bool text;
  int64_t frame0;
  int n_frames;  // 1 for text: text rows share one key list
  int64_t tokens, row0;
  int rows;

  // Text tiles come first: they see every key, and long items are best started early.
  void init(const Frames& f, const Tiling& t, int64_t group, int64_t index) {
    text = index < t.text_chunks;
    int64_t chunk, size;
    if (text) {
      frame0 = 0, n_frames = 1, tokens = f.n_text, chunk = index, size = t.text_rows;
    } else {
      index -= t.text_chunks;
      frame0 = index / t.video_chunks * t.frames_per_tile;
      const int64_t left = f.n_frames - frame0;
      n_frames = static_cast<int>(left < t.frames_per_tile ? left : t.frames_per_tile);
      tokens = n_frames * f.frame_len, chunk = index % t.video_chunks, size = t.video_rows;
    }
    row0 = chunk * size;
    const int64_t left = group * tokens - row0;
    rows = left <= 0 ? 0 : static_cast<int>(left < size ? left : size);
  }
  // Row r of the tile: query head within its group, position in the sequence, and which mask row applies.
  void row(const Frames& f, int r, int64_t* head, int64_t* token, int* mask) const {
    const int64_t i = row0 + r, at = i % tokens;
    *head = i / tokens;
    *token = text ? f.token(true, at) : f.token(false, frame0 * f.frame_len + at);
    *mask = text ? 0 : static_cast<int>(at / f.frame_len);
  }
};

// The keys a tile sees among panels [first, first + span): `panel[i]`, and mask[m * span + i] for row class m.
struct KeyList {
  int64_t first, span;
  int32_t* panel;
  uint16_t* mask;
  int n;
  bool full;  // every listed key is visible to every row: masks need not be applied

  static int64_t bytes(int64_t span, int64_t classes) { return span * 4 + span * classes * 2 + 64; }
  void place(void* memory, int64_t max_span) {
    panel = static_cast<int32_t*>(memory);
    mask = reinterpret_cast<uint16_t*>(panel + max_span);
  }

  void build(const Frames& f, const Tile& tile, int64_t first_panel, int64_t n_panels) {
    first = first_panel, span = n_panels;
    memset(mask, 0, static_cast<size_t>(span * tile.n_frames) * sizeof(uint16_t));
    const int64_t tp = f.text_panels();
    for (int m = 0; m < tile.n_frames; ++m) {
      uint16_t* bits = mask + m * span;
      if (tile.text) {
        if (!f.text_visible) continue;
        add(bits, 0, 0, f.text_keys);
        add_frames(f, bits, tp, 0, f.n_frames);
        continue;
      }
      const int64_t frame = tile.frame0 + m;
      if (f.valid && !f.valid[frame]) continue;
      if (f.text_visible) add(bits, 0, 0, f.text_keys);
      for (int32_t i = f.q_ptr[frame]; i < f.q_ptr[frame + 1]; ++i) add_frames(f, bits, tp, f.q_runs[2 * i], f.q_runs[2 * i + 1]);
    }
    n = 0, full = true;
    for (int64_t i = 0; i < span; ++i) {
      unsigned any = 0, all = 0xffff;
      for (int m = 0; m < tile.n_frames; ++m) any |= mask[m * span + i], all &= mask[m * span + i];
      if (!any) continue;
      full = full && all == 0xffff;
      for (int m = 0; m < tile.n_frames; ++m) mask[m * span + n] = mask[m * span + i];  // n <= i: compaction in place
      panel[n++] = static_cast<int32_t>(first + i);
    }
  }

 private:
  void add_frames(const Frames& f, uint16_t* bits, int64_t base, int64_t frame, int64_t count) const {
    if (!f.valid && !f.kv_len) return add(bits, base, frame * f.frame_len, (frame + count) * f.frame_len);
    for (int64_t k = frame; k < frame + count; ++k) {
      if (f.valid && !f.valid[k]) continue;
      int64_t len = f.frame_len;
      if (f.kv_len && f.kv_len[k] < len) len = f.kv_len[k];
      if (len > 0) add(bits, base, k * f.frame_len, k * f.frame_len + len);
    }
  }
  // Tokens [begin, end) of the region whose panels start at `base`.
  void add(uint16_t* bits, int64_t base, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    int64_t p = base + begin / PANEL, last = base + (end - 1) / PANEL;
    const int64_t low = p, high = last;
    if (p < first) p = first;
    if (last >= first + span) last = first + span - 1;
    for (; p <= last; ++p) {
      unsigned m = 0xffff;
      if (p == low) m &= 0xffffu << (begin % PANEL);
      if (p == high) m &= 0xffffu >> (PANEL - 1 - (end - 1) % PANEL);
      bits[p - first] = static_cast<uint16_t>(bits[p - first] | m);
    }
  }
};

}  // namespace VK_ISA
}  // namespace vk
