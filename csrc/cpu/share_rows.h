// How the rows of a kernel are shared out to threads.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace prefcore::cpu {

// Call loop(begin, end) over ranges that make up [0, rows). A row is one thread's work, so results do not
// depend on the number of threads.
template <class Loop>
void share_rows(int64_t rows, int64_t cols, int threads, const Loop& loop) {
  if (rows == 0 || cols == 0) return;
  // A task is about this many elements: some tens of microseconds, far more than it costs to hand one out.
  constexpr int64_t kTask = 1 << 15;
  const int64_t step = std::max<int64_t>(1, kTask / cols);
  const int64_t tasks = (rows + step - 1) / step;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) return loop(0, rows);
  // Ignored rows cost next to nothing and come in runs, hence the dynamic schedule.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) loop(task * step, std::min(rows, (task + 1) * step));
}

}  // namespace prefcore::cpu
