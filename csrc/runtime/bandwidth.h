// What this machine can do at most, as the team's threads can get it.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace lc {

// Bytes a second of plain reading, all threads of the team: the largest median over several stream
// counts and prefetch distances, on huge pages, within `bytes` of memory and about `seconds`.
double measure_read_bandwidth(int64_t bytes, double seconds);

// Operations a second (a multiplication and an addition are two) of the best instruction of this
// tier for a format, in registers, all threads; the median of five runs of about `seconds` in all.
double measure_peak(Format format, double seconds);

}  // namespace lc
