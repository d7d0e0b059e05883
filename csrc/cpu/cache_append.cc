// Writes new tokens into their pages. Tokens that are neighbours in a page are neighbours in the
// input as well, so a page takes one copy. One thread: a decode step moves a kilobyte per
// sequence, and a prefill moves at memory speed what took far longer to compute.
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace flashmla::cpu {

namespace {

// What is in the page of sequence i's first new token before that token, from another page.
void CopyPageHead(const CacheAppendParams& p, int64_t i) {
  const int64_t start = p.start[i];
  const int64_t from = p.copy_from[i];
  if (start < 0 || start / kPageSize >= p.max_pages_per_seq) return;
  const int64_t page = p.block_table[i * p.max_pages_per_seq + start / kPageSize];
  if (page < 0 || page >= p.num_pages || from < 0 || from >= p.num_pages || from == page) return;
  auto* k_cache = static_cast<char*>(p.k_cache);
  std::memcpy(k_cache + page * kPageSize * p.token_bytes,
              k_cache + from * kPageSize * p.token_bytes, start % kPageSize * p.token_bytes);
}

}  // namespace

void CacheAppend(const CacheAppendParams& p, const ThreadPool& pool) {
  const auto* new_kv = static_cast<const char*>(p.new_kv);
  auto* k_cache = static_cast<char*>(p.k_cache);
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t start = p.start[i];
    const int64_t count = std::min<int64_t>(p.count[i], p.num_tokens);
    if (count > 0) CopyPageHead(p, i);
    for (int64_t j = std::max<int64_t>(-start, 0); j < count;) {
      const int64_t slot = (start + j) / kPageSize;  // in the table
      const int64_t row = (start + j) % kPageSize;   // in the page
      if (slot >= p.max_pages_per_seq) break;
      const int64_t rows = std::min(kPageSize - row, count - j);
      const int64_t page = p.block_table[i * p.max_pages_per_seq + slot];
      if (page >= 0 && page < p.num_pages) {
        std::memcpy(k_cache + (page * kPageSize + row) * p.token_bytes,
                    new_kv + (i * p.num_tokens + j) * p.token_bytes, rows * p.token_bytes);
      }
      j += rows;
    }
  }
}

}  // namespace flashmla::cpu
