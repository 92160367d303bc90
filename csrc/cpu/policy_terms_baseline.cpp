#define PREFCORE_ISA baseline
#define PREFCORE_LANE_BYTES 16
#include "cpu/policy_terms_rows.inl"
