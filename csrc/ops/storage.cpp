// Ops on memory as such: moving it from and to files, and where it lies.
#include "runtime/storage.h"

#include "ops/check.h"
#include "runtime/ownership.h"
#include "runtime/topology.h"

namespace lc {
namespace {

Memory memory(const char* op, int64_t address, int64_t bytes, int64_t groups) {
  const Call c(op, true);
  if (address <= 0 || address % kDirectAlign != 0) c.fail("address", "a page's", std::to_string(address));
  c.range("bytes", bytes, 1, int64_t{1} << 50);
  c.range("groups", groups, 1, bytes);
  c.refuse_capture("address");
  return {reinterpret_cast<uint8_t*>(address), bytes, groups};
}
FilePlace place(const char* op, int64_t file, int64_t offset, bool direct) {
  const Call c(op, true);
  c.range("file", file, 0, int64_t{1} << 30);
  c.range("offset", offset, 0, int64_t{1} << 60);
  if (direct && offset % kDirectAlign != 0)
    c.fail("offset", "a multiple of " + std::to_string(kDirectAlign), std::to_string(offset));
  return {static_cast<int>(file), offset, direct};
}

int64_t read_memory(int64_t address, int64_t bytes, int64_t groups, int64_t file, int64_t offset, bool direct) {
  const Memory r = memory("read_memory", address, bytes, groups);
  return static_cast<int64_t>(load_memory(r, place("read_memory", file, offset, direct)));
}
int64_t write_memory(int64_t address, int64_t bytes, int64_t groups, int64_t file, int64_t offset, bool direct) {
  const Memory r = memory("write_memory", address, bytes, groups);
  return static_cast<int64_t>(store_memory(r, place("write_memory", file, offset, direct)));
}
void touch_memory(int64_t address, int64_t bytes, int64_t groups) {
  place_memory(memory("touch_memory", address, bytes, groups));
}
std::string memory_placement(int64_t address, int64_t bytes, int64_t groups) {
  const Placement p = placement_of(memory("memory_placement", address, bytes, groups));
  return std::to_string(p.pages) + " " + std::to_string(p.unknown) + " " + std::to_string(p.own);
}

int64_t pack_version() { return kPackVersion; }

// Threads, one a line: core's logical processor, socket, node; before them quota and logical processors.
std::string topology(std::string root, Desc allowed) {
  std::vector<int> cpus;
  for (const int64_t cpu : allowed) {
    Call("topology", true).range("allowed", cpu, 0, 1 << 16);
    cpus.push_back(static_cast<int>(cpu));
  }
  const Topology t = cpus.empty() ? this_topology() : read_topology(root, cpus);
  std::string out = std::to_string(t.quota) + " " + std::to_string(t.logical) + " " + std::to_string(t.threads());
  for (const Core& core : t.cores)
    out += "\n" + std::to_string(core.cpu) + " " + std::to_string(core.package) + " " + std::to_string(core.node);
  return out;
}
std::string owned_ranges(int64_t n, int64_t threads, int64_t turn) {
  const Call c("owned_ranges", true);
  c.range("n", n, 0, int64_t{1} << 40);
  c.range("threads", threads, 1, 1024);
  c.range("turn", turn, 0, int64_t{1} << 31);
  std::string out;
  for (int64_t t = 0; t < threads; ++t) {
    const Range r = owned(n, t, threads, turn);
    out += std::to_string(r.begin) + " " + std::to_string(r.end) + "\n";
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) {
  m.def("read_memory(int address, int bytes, int groups, int file, int offset, bool direct) -> int");
  m.def("write_memory(int address, int bytes, int groups, int file, int offset, bool direct) -> int");
  m.def("touch_memory(int address, int bytes, int groups) -> ()");
  m.def("memory_placement(int address, int bytes, int groups) -> str");
  m.def("pack_version() -> int");
  m.def("topology(str root, int[] allowed) -> str");
  m.def("owned_ranges(int n, int threads, int turn) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(latentcore, CompositeExplicitAutograd, m) {
  m.impl("read_memory", TORCH_BOX(&read_memory));
  m.impl("write_memory", TORCH_BOX(&write_memory));
  m.impl("touch_memory", TORCH_BOX(&touch_memory));
  m.impl("memory_placement", TORCH_BOX(&memory_placement));
  m.impl("pack_version", TORCH_BOX(&pack_version));
  m.impl("topology", TORCH_BOX(&topology));
  m.impl("owned_ranges", TORCH_BOX(&owned_ranges));
}

}  // namespace
}  // namespace lc
