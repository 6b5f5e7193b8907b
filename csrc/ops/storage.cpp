// Ops on memory as such: moving it from and to files, and where it lies.
#include "runtime/storage.h"

#include "ops/check.h"
#include "runtime/ownership.h"
#include "runtime/topology.h"

namespace lc {
namespace {

// A tensor's bytes, `groups` equal pieces.
Memory memory(const Call& c, const char* name, const Tensor& t, int64_t groups, bool written) {
  const Call::View v = written ? c.target(name, t, DType::Byte, {kAny}) : c.tensor(name, t, DType::Byte, {kAny});
  if (v.size(0) < 1) c.fail(name, "at least one byte", "none");
  c.range("groups", groups, 1, v.size(0));
  c.refuse_capture(name);
  return {static_cast<uint8_t*>(v.data), v.size(0), groups};
}

FilePlace place(const Call& c, const char* name, const Tensor& t, const Memory& m, int64_t file, int64_t offset,
                bool direct) {
  c.range("file", file, 0, int64_t{1} << 30);
  c.range("offset", offset, 0, int64_t{1} << 60);
  if (direct) {
    if (offset % kDirectAlign != 0)
      c.fail("offset", "a multiple of " + std::to_string(kDirectAlign), std::to_string(offset));
    const int64_t odd = static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.data) % kDirectAlign);
    if (odd != 0)
      c.fail(name, "memory aligned to " + std::to_string(kDirectAlign) + " bytes", std::to_string(odd));
    // What lies behind the tensor's end is moved too, and has to be its own.
    int64_t room = 0;
    if (aoti_torch_get_storage_size(t.get(), &room) != 0) c.fail(name, "a tensor with memory", "none");
    room -= t.storage_offset();
    if (room < round_up(m.bytes, kDirectAlign))
      c.fail(name, "memory to the end of its last " + std::to_string(kDirectAlign) + " bytes",
             std::to_string(room) + " bytes");
  }
  return {static_cast<int>(file), offset, direct};
}

using Move = Moved (*)(const Memory&, const FilePlace&);

template <bool Run>
void move(const char* op, Move moved, const char* name, const Tensor& t, bool written, int64_t groups,
          int64_t file, int64_t offset, bool direct, const Tensor& result) {
  checked(op, Run, [&](const Call& c) {
    const Memory m = memory(c, name, t, groups, written);
    const FilePlace at = place(c, name, t, m, file, offset, direct);
    auto* out = c.output<int64_t>("result", result, DType::Long, {2});
    if (!c.runs()) return;
    c.apart();
    const Moved done = moved(m, at);
    out[0] = static_cast<int64_t>(done.sum);
    out[1] = done.error;
  });
}
template <bool Run>
void read_memory(Tensor dst, int64_t groups, int64_t file, int64_t offset, bool direct, Tensor result) {
  move<Run>("read_memory", &load_memory, "dst", dst, true, groups, file, offset, direct, result);
}
LC_OP(read_memory, "(Tensor(a!) dst, int groups, int file, int offset, bool direct, Tensor(b!) result) -> ()")
template <bool Run>
void write_memory(Tensor src, int64_t groups, int64_t file, int64_t offset, bool direct, Tensor result) {
  move<Run>("write_memory", &store_memory, "src", src, false, groups, file, offset, direct, result);
}
LC_OP(write_memory, "(Tensor src, int groups, int file, int offset, bool direct, Tensor(a!) result) -> ()")

template <bool Run>
void touch_memory(Tensor dst, int64_t groups) {
  checked("touch_memory", Run, [&](const Call& c) {
    const Memory m = memory(c, "dst", dst, groups, true);
    if (c.runs()) place_memory(m);
  });
}
LC_OP(touch_memory, "(Tensor(a!) dst, int groups) -> ()")

template <bool Run>
void memory_placement(Tensor memory, int64_t groups, Tensor counts) {
  checked("memory_placement", Run, [&](const Call& c) {
    const Memory m = lc::memory(c, "memory", memory, groups, false);
    auto* out = c.output<int64_t>("counts", counts, DType::Long, {3});
    if (!c.runs()) return;
    c.apart();
    const Placement p = placement_of(m);
    out[0] = p.pages;
    out[1] = p.unknown;
    out[2] = p.own;
  });
}
LC_OP(memory_placement, "(Tensor memory, int groups, Tensor(a!) counts) -> ()")

int64_t pack_version() { return kPackVersion; }

// Threads, one a line: core's logical processor, socket, node; before them quota and logical processors.
std::string text(const Topology& t) {
  std::string out = std::to_string(t.quota) + " " + std::to_string(t.logical) + " " + std::to_string(t.threads());
  for (const Core& core : t.cores)
    out += "\n" + std::to_string(core.cpu) + " " + std::to_string(core.package) + " " + std::to_string(core.node);
  return out;
}
std::string topology() { return text(this_topology()); }
Topology below(const Call& c, const std::string& root, Desc allowed) {
  if (allowed.empty()) c.fail("allowed", "at least one processor", "none");
  std::vector<int> cpus;
  for (const int64_t cpu : allowed) {
    c.range("allowed", cpu, 0, 1 << 16);
    cpus.push_back(static_cast<int>(cpu));
  }
  return read_topology(root, cpus);
}
std::string topology_below(std::string root, Desc allowed) {
  return text(below(Call("topology_below", true), root, allowed));
}
// For each of `threads` threads there, whose work it takes, in order: its own first.
std::string help_below(std::string root, Desc allowed, int64_t threads) {
  const Call c("help_below", true);
  const Topology topology = below(c, root, allowed);
  c.range("threads", threads, 1, static_cast<int64_t>(topology.cores.size()));
  const std::vector<Range> near = node_mates(topology.place(static_cast<int>(threads)));
  std::string out;
  for (int t = 0; t < threads; ++t) {
    each_helped(near[static_cast<size_t>(t)], t, [&](int of) { out += std::to_string(of) + " "; });
    out += "\n";
  }
  return out;
}
// A line a thread: where its share of(t) begins and ends.
template <class Of>
std::string shares(int64_t threads, const Of& of) {
  std::string out;
  for (int64_t t = 0; t < threads; ++t) {
    const Range r = of(t);
    out += std::to_string(r.begin) + " " + std::to_string(r.end) + "\n";
  }
  return out;
}
std::string owned_ranges(int64_t n, int64_t threads, int64_t turn) {
  const Call c("owned_ranges", true);
  c.range("n", n, 0, int64_t{1} << 40);
  c.range("threads", threads, 1, 1024);
  c.range("turn", turn, 0, int64_t{1} << 31);
  return shares(threads, [&](int64_t t) { return owned(n, t, threads, turn); });
}
// Shares of one of several matrices that threads go through without a barrier between, as moe and mlp share
// them out at few rows: "gate_up" in panels, of n pairs; "down" in panels.
std::string owned_lists(std::string what, int64_t n, int64_t at, int64_t lists, int64_t threads) {
  const Call c("owned_lists", true);
  if (what != "gate_up" && what != "down") c.fail("what", "gate_up or down", what);
  c.range("n", n, 0, int64_t{1} << 32);
  c.range("lists", lists, 1, 1 << 20);
  c.range("at", at, 0, lists - 1);
  c.range("threads", threads, 1, 1024);
  return shares(threads, [&](int64_t t) {
    return what == "down" ? owned_columns(n, at, lists, t, threads) : owned_panels(n, at, lists, t, threads);
  });
}
// Shares of one matrix at few rows, in pieces along K.
std::string owned_pieces(int64_t panels, int64_t pieces, int64_t threads) {
  const Call c("owned_pieces", true);
  c.range("panels", panels, 0, int64_t{1} << 24);
  c.range("pieces", pieces, 1, 1 << 20);
  c.range("threads", threads, 1, 1024);
  return shares(threads, [&](int64_t t) { return lc::owned_pieces(panels, pieces, t, threads); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) {
  m.def("pack_version() -> int");
  m.def("topology() -> str");
  m.def("topology_below(str root, int[] allowed) -> str");
  m.def("help_below(str root, int[] allowed, int threads) -> str");
  m.def("owned_ranges(int n, int threads, int turn) -> str");
  m.def("owned_pieces(int panels, int pieces, int threads) -> str");
  m.def("owned_lists(str what, int n, int at, int lists, int threads) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(latentcore, CompositeExplicitAutograd, m) {
  m.impl("pack_version", TORCH_BOX(&pack_version));
  m.impl("topology", TORCH_BOX(&topology));
  m.impl("topology_below", TORCH_BOX(&topology_below));
  m.impl("help_below", TORCH_BOX(&help_below));
  m.impl("owned_ranges", TORCH_BOX(&owned_ranges));
  m.impl("owned_pieces", TORCH_BOX(&owned_pieces));
  m.impl("owned_lists", TORCH_BOX(&owned_lists));
}

}  // namespace
}  // namespace lc
