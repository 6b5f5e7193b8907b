// This machine's read bandwidth, as the team's threads can get it.
#pragma once

#include <cstdint>

namespace lc {

// Bytes a second of plain reading, all threads of the team: the largest median over several stream
// counts and prefetch distances, on huge pages, within `bytes` of memory and about `seconds`.
double measure_read_bandwidth(int64_t bytes, double seconds);

}  // namespace lc
