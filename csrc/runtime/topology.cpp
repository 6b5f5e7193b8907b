#include "runtime/topology.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <utility>

namespace lc {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream f(path);
  std::string line;
  std::getline(f, line);
  return line;
}

int read_int(const std::string& path, int fallback) {
  std::ifstream f(path);
  int v;
  return (f >> v) ? v : fallback;
}

// A kernel list such as "0-3,8,10-11"; what is no list is empty.
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> out;
  std::istringstream in(text);
  std::string part;
  while (std::getline(in, part, ',')) {
    int low = 0, high = 0;
    char dash = 0;
    std::istringstream range(part);
    if (!(range >> low)) continue;
    high = (range >> dash >> high) && dash == '-' ? high : low;
    for (int cpu = low; cpu <= high && cpu - low < (1 << 16); ++cpu) out.push_back(cpu);
  }
  return out;
}

std::map<int, int> nodes_of_cpus(const std::string& root) {
  std::map<int, int> out;
  const std::string base = root + "/sys/devices/system/node/";
  for (const int node : parse_list(first_line(base + "online")))
    for (const int cpu : parse_list(first_line(base + "node" + std::to_string(node) + "/cpulist")))
      out[cpu] = node;
  return out;
}

// Whole processors of a quota and a period in microseconds; 0 where there is no limit.
int whole(double quota, double period) {
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period)) : 0;
}
int quota_v2(const std::string& folder) {
  std::istringstream in(first_line(folder + "/cpu.max"));
  std::string quota;
  double period = 0;
  return in >> quota >> period && quota != "max" ? whole(std::atof(quota.c_str()), period) : 0;
}
int quota_v1(const std::string& folder) {
  return whole(read_int(folder + "/cpu.cfs_quota_us", -1), read_int(folder + "/cpu.cfs_period_us", -1));
}

// The least quota of the process's control group and of those around it; 0 where none has any.
int cgroup_quota(const std::string& root) {
  int least = 0;
  const auto walk = [&](const std::string& base, std::string path, int (*quota)(const std::string&)) {
    // Inside a container the group's own folder may be mounted as the root, so the root is read too.
    for (;;) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      const int q = quota(base + path);
      if (q > 0 && (least == 0 || q < least)) least = q;
      if (path.empty()) return;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  };
  std::ifstream groups(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string path = line.substr(second + 1);
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers == ",,")
      walk(root + "/sys/fs/cgroup", path, quota_v2);
    else if (controllers.find(",cpu,") != std::string::npos)
      walk(root + "/sys/fs/cgroup/cpu", path, quota_v1);
  }
  return least;
}

}  // namespace

int Topology::threads() const {
  const int n = std::max(1, static_cast<int>(cores.size()));
  return quota > 0 ? std::min(n, quota) : n;
}
int Topology::nodes() const {
  std::set<int> seen;
  for (const Core& core : cores) seen.insert(core.node);
  return static_cast<int>(seen.size());
}
int Topology::packages() const {
  std::set<int> seen;
  for (const Core& core : cores) seen.insert(core.package);
  return static_cast<int>(seen.size());
}

std::vector<Core> Topology::place(int n) const {
  std::vector<Core> out;
  const size_t all = cores.size(), count = static_cast<size_t>(n);
  for (size_t t = 0; t < count; ++t) out.push_back(cores[t * all / count]);
  return out;
}

std::vector<Range> node_mates(const std::vector<Core>& placed) {
  std::vector<Range> out;
  const int64_t n = static_cast<int64_t>(placed.size());
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    while (end < n && placed[static_cast<size_t>(end)].node == placed[static_cast<size_t>(begin)].node) ++end;
    out.insert(out.end(), static_cast<size_t>(end - begin), Range{begin, end});
  }
  return out;
}

Topology read_topology(const std::string& root, const std::vector<int>& allowed) {
  Topology out;
  out.logical = std::max<int>(1, static_cast<int>(allowed.size()));
  out.quota = cgroup_quota(root);
  const std::map<int, int> nodes = nodes_of_cpus(root);
  std::set<std::string> seen;
  for (const int cpu : allowed) {
    const std::string base = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const int package = std::max(0, read_int(base + "physical_package_id", 0));
    // The list of a core's logical processors is unique; core_id is so only within a die.
    std::string core = first_line(base + "core_cpus_list");
    if (core.empty()) core = first_line(base + "thread_siblings_list");
    if (core.empty()) {
      const int id = read_int(base + "core_id", -1);
      core = id < 0 ? "cpu " + std::to_string(cpu)
                    : std::to_string(package) + " " + std::to_string(read_int(base + "die_id", 0)) + " " +
                          std::to_string(id);
    }
    if (!seen.insert(core).second) continue;
    const auto node = nodes.find(cpu);
    out.cores.push_back({cpu, package, node == nodes.end() ? 0 : node->second});
  }
  std::stable_sort(out.cores.begin(), out.cores.end(), [](const Core& a, const Core& b) {
    return std::pair(a.package, a.node) < std::pair(b.package, b.node);
  });
  return out;
}

std::vector<int> allowed_cpus() {
  // Room for machines with more than CPU_SETSIZE logical processors.
  constexpr int kMax = 8192;
  cpu_set_t* set = CPU_ALLOC(kMax);
  const size_t bytes = CPU_ALLOC_SIZE(kMax);
  CPU_ZERO_S(bytes, set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, bytes, set) == 0)
    for (int i = 0; i < kMax; ++i)
      if (CPU_ISSET_S(i, bytes, set)) cpus.push_back(i);
  CPU_FREE(set);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

Topology this_topology() { return read_topology("", allowed_cpus()); }

}  // namespace lc
