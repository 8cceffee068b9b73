// rlhf_kernels._host: build information, the CPU's instruction sets, and the planners that are too slow in Python.
// rlhf_kernels/packing.py holds their specification in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/isa.h"

namespace py = pybind11;
using Lengths = std::vector<int64_t>;
using Bins = std::vector<std::vector<int64_t>>;

namespace {

std::vector<int64_t> longest_first(const Lengths& lengths) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

void check_lengths(const Lengths& lengths, int64_t limit, const char* limit_name) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0 || lengths[i] > limit) {
      throw py::value_error("lengths: expected every length in [0, " + std::string(limit_name) + "=" +
                            std::to_string(limit) + "], got " + std::to_string(lengths[i]) + " at index " +
                            std::to_string(i) + "; truncate or drop that sequence, or raise " + limit_name);
    }
  }
}

// Best fit decreasing: the fullest bin that still has room takes the next longest sequence.
Bins pack_sequences(const Lengths& lengths, int64_t capacity) {
  check_lengths(lengths, capacity, "capacity");
  Bins bins;
  std::set<std::pair<int64_t, int64_t>> room;  // (room left, bin)
  for (int64_t i : longest_first(lengths)) {
    auto best = room.lower_bound({lengths[i], -1});
    int64_t bin, left;
    if (best == room.end()) {
      bin = static_cast<int64_t>(bins.size());
      left = capacity;
      bins.emplace_back();
    } else {
      left = best->first;
      bin = best->second;
      room.erase(best);
    }
    bins[bin].push_back(i);
    room.insert({left - lengths[i], bin});
  }
  return bins;
}

// Longest first, a micro-batch is filled while (sequences in it) * (its longest) stays within the budget.
Bins plan_microbatches(const Lengths& lengths, int64_t token_budget) {
  check_lengths(lengths, token_budget, "token_budget");
  Bins batches;
  int64_t longest = 0;
  for (int64_t i : longest_first(lengths)) {
    if (batches.empty() || static_cast<int64_t>(batches.back().size() + 1) * longest > token_budget) {
      batches.emplace_back();
      longest = lengths[i];
    }
    batches.back().push_back(i);
  }
  return batches;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<int64_t>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return std::string(rlhf::cpu_isa()); });
  m.def("cpu_is_amd", &rlhf::cpu_is_amd);
  m.def("cpu_supports", [](const std::string& isa) { return rlhf::cpu_supports(isa.c_str()); }, py::arg("isa"));
  m.def("pack_sequences", &pack_sequences, py::arg("lengths"), py::arg("capacity"));
  m.def("plan_microbatches", &plan_microbatches, py::arg("lengths"), py::arg("token_budget"));
}
