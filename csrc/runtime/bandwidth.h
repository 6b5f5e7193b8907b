// What this machine can do at most, as the team's threads can get it.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace lc {

// Bytes of all last-level caches that this machine's processors have; 0 where sysfs does not say.
int64_t last_level_cache();

// Bytes a second of plain reading, all threads of the team: the largest median over several stream
// counts and prefetch distances, on huge pages, in about `seconds`. The buffer is eight times the
// last-level caches (512 MiB to 4 GiB), but `most_bytes` at most; where that is less than eight times
// the caches, they are emptied of it before each pass.
double measure_read_bandwidth(double seconds, int64_t most_bytes);

// Operations a second (a multiplication and an addition are two) of the best instruction of this
// tier for a format, in registers, all threads; the median of five runs of about `seconds` in all.
double measure_peak(Format format, double seconds);

// How long the threads of the team take to meet, seconds: the mean over rounds, in about `seconds`, of a
// few microseconds of work and two barriers. Milliseconds where they cannot all run at the same time.
double measure_meeting(double seconds);

}  // namespace lc
