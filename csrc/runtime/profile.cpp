#include "runtime/profile.h"

#include <algorithm>
#include <cstdio>

namespace lc {
namespace {

constexpr size_t kRoom = 1 << 14;     // stamps a thread before its list grows
constexpr double kCalibration = 0.02;  // seconds: the least time to tell the counter's rate from

}  // namespace

Profile::Profile(int threads) : stamps_(static_cast<size_t>(threads)) {
  for (Stamps& s : stamps_) s.at.reserve(kRoom);
  start_ = std::chrono::steady_clock::now();
  start_ticks_ = __rdtsc();
}

std::string Profile::json() const {
  double elapsed;
  uint64_t ticks;
  do {
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    ticks = __rdtsc() - start_ticks_;
  } while (elapsed < kCalibration);
  const double tick = elapsed / static_cast<double>(ticks);
  // Counters of different cores may be a few ticks apart: a phase is never negative.
  const auto seconds = [&](uint64_t from, uint64_t to) {
    return tick * static_cast<double>(std::max<int64_t>(static_cast<int64_t>(to - from), 0));
  };
  std::string out = "[";
  char text[96];
  const auto number = [&](double value) {
    std::snprintf(text, sizeof text, "%.9f", value);
    return std::string(text);
  };
  for (size_t r = 0; r < regions_.size(); ++r) {
    const Region& region = regions_[r];
    const bool last = r + 1 == regions_.size();
    const size_t end_run = last ? runs_.size() : regions_[r + 1].first_run;
    const size_t end_stamp = (last ? stamps_[0].at.size() : regions_[r + 1].first_stamp) - 1;
    out += (r == 0 ? "[" : ",[") + number(seconds(region.begin, region.end)) + ",[";
    for (size_t i = region.first_run; i < end_run; ++i) {
      const size_t from = runs_[i].stamp;
      const size_t to = i + 1 < end_run ? runs_[i + 1].stamp : end_stamp;
      out += (i == region.first_run ? "[\"" : ",[\"") + std::string(runs_[i].name) + "\",";
      out += number(seconds(stamps_[0].at[from], stamps_[0].at[to])) + ",[";
      for (size_t p = from; p < to; p += 2) {
        double sum = 0, slowest = 0;
        for (const Stamps& s : stamps_) {
          const double busy = seconds(s.at[p], s.at[p + 1]);
          sum += busy;
          slowest = std::max(slowest, busy);
        }
        out += (p == from ? "[" : ",[") + number(sum / static_cast<double>(stamps_.size())) + "," +
               number(slowest) + "]";
      }
      out += "]]";
    }
    out += "]]";
  }
  return out + "]";
}

}  // namespace lc
