// Ops without tensors: threads, tier, graphs, measurements.
#include <chrono>
#include <map>
#include <memory>
#include <mutex>

#include "isa/isa.h"
#include "ops/check.h"
#include "runtime/bandwidth.h"
#include "runtime/topology.h"

namespace lc {
namespace {

void set_threads(int64_t n) {
  Call("set_threads", true).range("n", n, 1, 1024);
  Team::get().resize(static_cast<int>(n));
}
int64_t num_threads() { return Team::get().size(); }
std::string isa_tier() { return tier_name(tier()); }
void force_isa_tier(std::string name) {
  try {
    force_tier(name);
  } catch (const std::runtime_error& error) {
    Call("force_isa_tier", true).fail("name", std::string("a tier of this CPU (") + error.what() + ")", name);
  }
}
std::string cpu_features_text() {
  const CpuFeatures& f = cpu_features();
  std::string s;
  const auto add = [&](bool has, const char* name) {
    if (has) s += (s.empty() ? "" : " ") + std::string(name);
  };
  add(f.avx2, "avx2");
  add(f.avx512, "avx512");
  add(f.avx512_bf16, "avx512_bf16");
  add(f.avx512_vbmi, "avx512_vbmi");
  add(f.amx, "amx");
  return s;
}
int64_t packed_bytes(Desc d) { return Call("packed_bytes", true).layout("desc", d).bytes(); }
void release_scratch() { Team::get().release_scratch(); }

// Captured graphs by handle. Shared: one that is freed while another thread replays it ends with the replay.
std::mutex graphs_mutex;
std::map<int64_t, std::shared_ptr<Graph>> graphs;
int64_t next_graph = 1;

std::shared_ptr<Graph> find_graph(const char* op, int64_t handle) {
  std::lock_guard<std::mutex> lock(graphs_mutex);
  const auto it = graphs.find(handle);
  if (it == graphs.end()) Call(op, true).fail("handle", "a live graph", std::to_string(handle));
  return it->second;
}
int64_t graph_begin() {
  if (Graph::recording() != nullptr) Call("graph_begin", true).fail("thread", "no capture under way", "one");
  std::lock_guard<std::mutex> lock(graphs_mutex);
  const int64_t handle = next_graph++;
  Graph::recording() = (graphs[handle] = std::make_shared<Graph>()).get();
  return handle;
}
int64_t graph_end() {
  Graph* g = Graph::recording();
  if (g == nullptr) Call("graph_end", true).fail("thread", "a capture under way", "none");
  Graph::recording() = nullptr;
  return static_cast<int64_t>(g->size());
}
void graph_replay(int64_t handle) { find_graph("graph_replay", handle)->replay(); }
void graph_free(int64_t handle) {
  find_graph("graph_free", handle);
  std::lock_guard<std::mutex> lock(graphs_mutex);
  graphs.erase(handle);
}

void profile_begin() { Team::get().begin_profile(); }
std::string profile_end() { return Team::get().end_profile(); }

double in_seconds(const char* op, double seconds) {
  if (!(seconds > 0.0 && seconds <= 60.0)) Call(op, true).fail("seconds", "0..60", std::to_string(seconds));
  return seconds;
}
double peak_ops(int64_t format, double seconds) {
  if (!is_format(format)) Call("peak_ops", true).fail("fmt", "a packed format in 1..5", std::to_string(format));
  return measure_peak(static_cast<Format>(format), in_seconds("peak_ops", seconds));
}
double meeting_seconds(double seconds) { return measure_meeting(in_seconds("meeting_seconds", seconds)); }
double read_bandwidth(double seconds, int64_t most_bytes) {
  const int64_t least = int64_t{1} << 20;
  if (most_bytes < least)
    Call("read_bandwidth", true)
        .fail("most_bytes", std::to_string(least) + " or more", std::to_string(most_bytes));
  return measure_read_bandwidth(in_seconds("read_bandwidth", seconds), most_bytes);
}

STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) {
  m.def("set_threads(int n) -> ()");
  m.def("num_threads() -> int");
  m.def("isa_tier() -> str");
  m.def("force_isa_tier(str name) -> ()");
  m.def("cpu_features() -> str");
  m.def("packed_bytes(int[] desc) -> int");
  m.def("release_scratch() -> ()");
  m.def("graph_begin() -> int");
  m.def("graph_end() -> int");
  m.def("graph_replay(int handle) -> ()");
  m.def("graph_free(int handle) -> ()");
  m.def("profile_begin() -> ()");
  m.def("profile_end() -> str");
  m.def("peak_ops(int fmt, float seconds) -> float");
  m.def("last_level_cache() -> int");
  m.def("meeting_seconds(float seconds) -> float");
  m.def("read_bandwidth(float seconds, int most_bytes) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(latentcore, CompositeExplicitAutograd, m) {
  m.impl("set_threads", TORCH_BOX(&set_threads));
  m.impl("num_threads", TORCH_BOX(&num_threads));
  m.impl("isa_tier", TORCH_BOX(&isa_tier));
  m.impl("force_isa_tier", TORCH_BOX(&force_isa_tier));
  m.impl("cpu_features", TORCH_BOX(&cpu_features_text));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("release_scratch", TORCH_BOX(&release_scratch));
  m.impl("graph_begin", TORCH_BOX(&graph_begin));
  m.impl("graph_end", TORCH_BOX(&graph_end));
  m.impl("graph_replay", TORCH_BOX(&graph_replay));
  m.impl("graph_free", TORCH_BOX(&graph_free));
  m.impl("profile_begin", TORCH_BOX(&profile_begin));
  m.impl("profile_end", TORCH_BOX(&profile_end));
  m.impl("peak_ops", TORCH_BOX(&peak_ops));
  m.impl("last_level_cache", TORCH_BOX(&last_level_cache));
  m.impl("meeting_seconds", TORCH_BOX(&meeting_seconds));
  m.impl("read_bandwidth", TORCH_BOX(&read_bandwidth));
}

}  // namespace
}  // namespace lc
