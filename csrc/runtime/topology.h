// Which processors this process may use, and how they lie: sockets, memory nodes, cores.
#pragma once

#include <string>
#include <vector>

#include "runtime/ownership.h"

namespace lc {

// One physical core, by the first of its logical processors that may be used.
struct Core {
  int cpu;      // logical processor
  int package;  // socket
  int node;     // memory node; a socket in sub-NUMA clusters has several
};

struct Topology {
  std::vector<Core> cores;  // node by node, so that a contiguous range of threads shares a node
  int logical = 1;          // logical processors within the affinity mask
  int quota = 0;            // processors' worth of time that the control groups grant, at least 1; 0: no limit

  // Threads that run best: a core each, within the quota.
  int threads() const;
  int nodes() const;
  int packages() const;
  // The core of each of n threads, n at most cores.size(): in order, and evenly over the nodes.
  std::vector<Core> place(int n) const;
};

// For each of the cores that threads were placed on, the range of those in its memory node.
std::vector<Range> node_mates(const std::vector<Core>& placed);

// Reads sysfs and procfs below `root` ("" for this machine), for a process that may use the logical
// processors `allowed`. What cannot be read counts as one node, one socket, a core a processor.
Topology read_topology(const std::string& root, const std::vector<int>& allowed);

// The affinity mask of the calling thread.
std::vector<int> allowed_cpus();

// This process's topology, read anew.
Topology this_topology();

}  // namespace lc
