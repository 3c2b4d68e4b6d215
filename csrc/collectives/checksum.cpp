#include "collectives/checksum.h"

#include "collectives/crc32c.h"

namespace dear {
namespace {

uint32_t run(crc32c::Extend extend, const void* data, size_t size, uint32_t seed) {
  return ~extend(~seed, static_cast<const unsigned char*>(data), size);
}

crc32c::Extend fastest() {
  if (const crc32c::Extend way = crc32c::by_folding()) return way;
  if (const crc32c::Extend way = crc32c::by_instruction()) return way;
  return crc32c::by_table();
}

}  // namespace

uint32_t checksum(const void* data, size_t size, uint32_t seed) {
  static const crc32c::Extend way = fastest();
  return run(way, data, size, seed);
}

std::vector<std::pair<std::string, uint32_t>> checksum_each_way(const void* data, size_t size,
                                                                uint32_t seed) {
  std::vector<std::pair<std::string, uint32_t>> sums;
  for (const auto& [name, way] : {std::pair{"table", crc32c::by_table()},
                                  {"instruction", crc32c::by_instruction()},
                                  {"folding", crc32c::by_folding()}}) {
    if (way != nullptr) sums.emplace_back(name, run(way, data, size, seed));
  }
  return sums;
}

}  // namespace dear
