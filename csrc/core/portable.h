// What makes a function of csrc/core one of both devices.
#pragma once

#ifdef __CUDACC__
#define PREFCORE_HD __host__ __device__ __forceinline__
#else
#define PREFCORE_HD inline
#endif
