// Sorting by unsigned integers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace doublehead::nms {

// Sorts by ascending key(item), an unsigned integer; stable. Bytes in which no two keys differ cost little.
template <typename Item, typename Key>
void radix_sort(Item* items, int64_t count, std::vector<Item>& scratch, const Key& key) {
  using Unsigned = decltype(key(*items));
  constexpr int kDigits = sizeof(Unsigned);
  if (count < 2) return;
  std::array<std::array<uint32_t, 256>, kDigits> counts{};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][key(items[i]) >> 8 * digit & 255];
  }
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  Item *from = items, *to = scratch.data();
  for (int digit = 0; digit < kDigits; ++digit) {
    const auto value = [&](const Item& item) { return key(item) >> 8 * digit & 255; };
    if (counts[digit][value(from[0])] == count) continue;
    uint32_t offset = 0;
    for (uint32_t& start : counts[digit]) start = std::exchange(offset, offset + start);
    for (int64_t i = 0; i < count; ++i) to[counts[digit][value(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + count, items);
}

}  // namespace doublehead::nms
