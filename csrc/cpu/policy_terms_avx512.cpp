#define PREFCORE_ISA avx512
#define PREFCORE_LANE_BYTES 64
#include "cpu/policy_terms_rows.inl"
