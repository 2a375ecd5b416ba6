// Sorting by unsigned integers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace doublehead::nms {

// Sorts by ascending key(item), an unsigned integer; stable. Bytes in which no two keys differ cost nothing.
template <typename Item, typename Key>
void radix_sort(Item* items, int64_t count, std::vector<Item>& scratch, const Key& key) {
  using Unsigned = decltype(key(*items));
  if (count < 2) return;
  Unsigned differ = 0;
  for (int64_t i = 1; i < count; ++i) differ |= key(items[i]) ^ key(items[0]);
  if (differ == 0) return;
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  Item *from = items, *to = scratch.data();
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Unsigned)); shift += 8) {
    if ((differ >> shift & 255) == 0) continue;
    std::array<uint32_t, 257> start{};
    for (int64_t i = 0; i < count; ++i) ++start[(key(from[i]) >> shift & 255) + 1];
    for (int digit = 1; digit < 256; ++digit) start[digit] += start[digit - 1];
    for (int64_t i = 0; i < count; ++i) to[start[key(from[i]) >> shift & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + count, items);
}

}  // namespace doublehead::nms
