// How long the scheduler lets a thread run at a time, and with it how soon the thread runs when it wakes up.
#pragma once

#include <chrono>
#include <optional>

namespace sida {

// Asks for a short slice for the calling thread: from Linux 6.12 on a thread that wakes up then runs before one with a
// longer slice has used its own up. For threads that sleep in reads beside others that compute on all cores: each of
// their wake-ups would wait for milliseconds, in which the disk has nothing to do. Their share of the processor stays
// as it is, and no permission is needed; where the system does not know of slices nothing changes.
void take_short_slice();

// The calling thread's slice; none where the system does not tell.
std::optional<std::chrono::nanoseconds> thread_slice();

}  // namespace sida
