#define PREFCORE_ISA baseline
#define PREFCORE_LANE_BYTES 16
#include "cpu/logprobs_rows.inl"
