// What one task of a dense decode works on, and with.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "params.h"

namespace flashmla::cpu {

inline constexpr int64_t kMaxRows = 128;  // query rows of a task

// A tile of query rows over a chunk of tokens.
struct Task {
  int64_t sequence, head;          // of the KV heads
  int64_t first_row, rows;         // query rows
  int64_t first_token, end_token;  // those that the last row sees
  int64_t length;                  // of the sequence
  int64_t tile;                    // identifies sequence, head and first_row
};

// Where query row `row` of a KV head lies in [batch, s_q, h_q].
inline int64_t IndexOfRow(const DenseDecodeParams& p, const Task& task, int64_t row) {
  return (task.sequence * p.s_q + row / p.group()) * p.h_q + task.head * p.group() +
         row % p.group();
}

// The end of the tokens that query row `row` sees.
inline int64_t EndOfRow(const DenseDecodeParams& p, int64_t length, int64_t row) {
  return p.causal ? length - p.s_q + row / p.group() + 1 : length;
}

// Which of the pool's tokens, each KV head's counted, is token `token` of the task's sequence and
// head; -1 if its page does not exist. The other tokens of its page lie h_kv apart.
inline int64_t IndexOfToken(const DenseDecodeParams& p, const Task& task, int64_t token) {
  const int64_t slot = token / kPageSize;
  if (slot >= p.max_pages_per_seq) return -1;
  const int64_t page = p.block_table[task.sequence * p.max_pages_per_seq + slot];
  if (page < 0 || page >= p.num_pages) return -1;
  return (page * kPageSize + token % kPageSize) * p.h_kv + task.head;
}

// Uninitialised floats, aligned for any vector.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float[], Delete> data_;
};

// What `rows` query rows know of the tokens they have seen. There is room for whole groups of 16,
// so that a kernel may compute more rows than there are.
struct Partial {
  Partial() = default;
  explicit Partial(int64_t rows)
      : capacity((rows + 15) / 16 * 16), buffer(capacity * (kHeadDimV + 2)) {}
  explicit operator bool() const { return buffer.data() != nullptr; }
  float* acc() const { return buffer.data(); }                         // [capacity, kHeadDimV]
  float* max() const { return buffer.data() + capacity * kHeadDimV; }  // [capacity]
  float* sum() const { return buffer.data() + capacity * (kHeadDimV + 1); }  // [capacity]

  int64_t capacity = 0;
  Buffer buffer;
};

// A thread's memory, kept from task to task.
struct Scratch {
  Buffer workspace;   // as large as the kernel wants it
  Partial partial;    // the result of a task
  int64_t tile = -1;  // whose queries the workspace holds
};

}  // namespace flashmla::cpu
