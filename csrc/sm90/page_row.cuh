// Where a new token goes.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

// The row of a page for new token j of sequence i, and what must be copied into the page before.
struct PageRow {
  uint4* data = nullptr;          // nullptr: the token has no place
  const uint4* shared = nullptr;  // copy on write: the page whose first rows come before
  int size;                       // vectors of a row
  int rows;                       // before this one

  __device__ __forceinline__ PageRow(const CacheAppendParams& p, int64_t i, int64_t j)
      : size(static_cast<int>(p.token_bytes / sizeof(uint4))) {
    const int64_t from = j == 0 ? p.copy_from[i] : -1;
    const int64_t position = p.start[i] + j;
    if (j >= p.count[i] || position < 0) return;
    const int64_t slot = position / kPageSize;  // in the table
    if (slot >= p.max_pages_per_seq) return;
    const int64_t page = p.block_table[i * p.max_pages_per_seq + slot];
    if (page < 0 || page >= p.num_pages) return;
    rows = static_cast<int>(position % kPageSize);
    auto* pool = static_cast<uint4*>(p.k_cache);
    data = pool + (page * kPageSize + rows) * size;
    if (from >= 0 && from < p.num_pages && from != page) shared = pool + from * kPageSize * size;
  }

  __device__ __forceinline__ bool exists() const { return data != nullptr; }

  // Copies what comes before, if anything does: rare, so by one team of threads, each of which has
  // so many copies under way.
  template <int kCopies>
  __device__ __forceinline__ void CopyShared(int rank, int team) const {
    if (shared == nullptr) return;
    const int end = rows * size;
    uint4* target = data - end;
    for (int first = rank; first < end; first += kCopies * team) {
      uint4 vectors[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (const int v = first + i * team; v < end) vectors[i] = shared[v];
      }
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (const int v = first + i * team; v < end) target[v] = vectors[i];
      }
    }
  }
};

}  // namespace flashmla::sm90
