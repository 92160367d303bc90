#include "cpu/policy_terms.h"

#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;
using namespace prefcore::cpu;

namespace {

void policy_terms(int type, int64_t n, int form, int kl, Address logps, Address old_logps, Address advantages,
                  Address log_ratio, Address weights, Address ref_logps, Address kl_values, Address kl_coefs,
                  Address entropy, double low, double high, double dual, double kl_coef, double entropy_coef,
                  double clamp, Address losses, Address slopes, Address sums, int level, int threads) {
  check_isa(level);
  const PolicyTokens tokens{static_cast<prefcore::Type>(type),
                            n,
                            static_cast<Form>(form),
                            static_cast<Kl>(kl),
                            pointer<>(logps),
                            pointer<>(old_logps),
                            pointer<>(advantages),
                            pointer<>(log_ratio),
                            pointer<>(weights),
                            pointer<>(ref_logps),
                            pointer<>(kl_values),
                            pointer<>(kl_coefs),
                            pointer<>(entropy),
                            low,
                            high,
                            dual,
                            kl_coef,
                            entropy_coef,
                            clamp,
                            pointer<>(losses),
                            pointer<>(slopes),
                            pointer<double>(sums)};
  py::gil_scoped_release release;
  run_policy_terms(tokens, level, threads);
}

}  // namespace

void bind_policy_terms(py::module_& m) {
  m.attr("policy_block") = kPolicyBlock;
  m.def("policy_terms", &policy_terms);
}
