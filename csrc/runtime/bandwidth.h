// What this machine can do at most, as the team's threads can get it.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace lc {

// Bytes of all last-level caches that this machine's processors have; 0 where sysfs does not say.
int64_t last_level_cache();

// Bytes a second of plain reading, all threads of the team: the largest median over several stream
// counts and prefetch distances, on huge pages, within twice the last-level caches (512 MiB at
// least), in about `seconds`.
double measure_read_bandwidth(double seconds);

// Operations a second (a multiplication and an addition are two) of the best instruction of this
// tier for a format, in registers, all threads; the median of five runs of about `seconds` in all.
double measure_peak(Format format, double seconds);

}  // namespace lc
