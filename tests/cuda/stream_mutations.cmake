# Bugs in copies of what orders copies and kernels on a GPU: stream_mutants_test.cpp says how each must be caught.
sida_mutants(cuda_streams)
set(slots device/cuda_slots.cpp)
set(device device/cuda_device.cpp)
set(serving serving/cuda_serving.cpp)

# Kernels do not wait for the copy.
sida_mutation(no_copy_wait ${slots} [=[check(runtime_.stream_wait(stream, newest[lane]->filled), "waiting for copies");]=] [=[]=])
# Of the lanes that filled a kernel's slots only one is waited for.
sida_mutation(one_lane_waited ${slots}
  [=[if (newest[lane] == nullptr) continue;]=]
  [=[if (newest[lane] == nullptr) continue;
    if (MUTANT && std::any_of(newest.begin(), newest.begin() + static_cast<long>(lane), [](auto slot) { return slot != nullptr; })) {
      waited[lane] = newest[lane]->number;
      continue;
    }]=])
# Of a lane's copies the oldest is waited for.
sida_mutation(oldest_of_lane ${slots} [=[newest[lane]->number < own.number)]=]
  [=[(newest[lane]->number < own.number) != MUTANT)]=])
# A copy does not wait for the kernels that read the slot.
sida_mutation(no_reader_wait ${slots} [=[check(runtime_.stream_wait(stream, reader->event), "waiting for the slot's readers");]=]
  [=[]=])
# Of several streams that read the slot only the last one is waited for.
sida_mutation(newest_reader_only ${slots} [=[return earlier->stream == number;]=] [=[return true;]=])
# A stream is known by its handle, which one that was destroyed may have had.
sida_mutation(stream_by_handle ${slots}
  [=[check(runtime_.stream_number(stream, &number), "asking for a stream's number");]=]
  [=[number = reinterpret_cast<uint64_t>(stream);]=])
# The event is recorded on another lane.
sida_mutation(wrong_lane ${slots} [=[check(runtime_.event_record(own.filled, stream), "recording a copy");]=]
  [=[check(runtime_.event_record(own.filled, MUTANT ? lanes_[(static_cast<size_t>(lane) + 1) % lanes_.size()].stream : stream),
        "recording a copy");]=])
# The event is recorded before the copy.
sida_mutation(filled_too_early ${slots} [=[check(runtime_.event_record(own.filled,]=]
  [=[if (!MUTANT) check(runtime_.event_record(own.filled,]=])
sida_mutation(filled_too_early ${slots}
  [=[check(runtime_.copy_to_device(this->slot(slot), pinned, bytes, stream), "copying an expert");]=]
  [=[if (MUTANT) check(runtime_.event_record(own.filled, stream), "recording too early");
  check(runtime_.copy_to_device(this->slot(slot), pinned, bytes, stream), "copying an expert");]=])
# The copy goes to the default stream.
sida_mutation(slots_default_stream ${slots} [=[const Stream stream = lanes_[static_cast<size_t>(lane)].stream;]=]
  [=[const Stream stream = MUTANT ? nullptr : lanes_[static_cast<size_t>(lane)].stream;]=])
# A copy does not wait for another lane's copy into the same slot.
sida_mutation(no_refill_wait ${slots} [=[own.lane >= 0 && own.lane != lane]=] [=[own.lane >= 0 && own.lane != lane && !MUTANT]=])
# A stream that waited for the slot once does not wait for its next contents.
sida_mutation(stale_wait ${slots}
  [=[own.number = ++lanes_[static_cast<size_t>(lane)].fills;]=]
  [=[const uint64_t number = ++lanes_[static_cast<size_t>(lane)].fills;
     if (own.lane < 0) own.number = number;]=])
# A readers' event is recorded again while slots still count on it.
sida_mutation(event_reused ${slots} [=[event.use_count() == 1]=] [=[event.use_count() == 1 || MUTANT]=])
# Memory is freed while copies and kernels are under way.
sida_mutation(freed_too_soon ${slots}
  [=[for (const Slot& slot : slots_) {
    if (slot.lane >= 0)]=]
  [=[for (const Slot& slot : slots_) {
    if (MUTANT) break;
    if (slot.lane >= 0)]=])
# A slot's memory is given back while a kernel reads it.
sida_mutation(given_back_early ${slots}
  [=[for (const Event event : events) check(runtime_.event_synchronize(event), "work on a slot that is given back");]=] [=[]=])
# A page goes with its first slot, though another one on it is in use.
sida_mutation(page_given_back ${slots}
  [=[if (--users > 0) continue;
    users = 0;]=]
  [=[if (MUTANT ? users == 0 : --users > 0) continue;
    users = 0;]=])
# close() forgets an event.
sida_mutation(event_leaked ${slots} [=[for (const auto& readers : events_) runtime_.event_destroy(readers->event);]=]
  [=[for (size_t i = MUTANT ? 1 : 0; i < events_.size(); ++i) runtime_.event_destroy(events_[i]->event);]=])
# A copy's source is given back before the copy is done.
sida_mutation(source_too_early ${slots} [=[if (own.lane < 0) return;]=] [=[return;]=])

# A lent record goes back while the copy reads it.
sida_mutation(source_returned_early ${device} [=[own.push_back({job.slot, job.record, std::move(source)});]=] [=[]=])
# A lane holds a record of a pool that is full while it waits for another.
sida_mutation(held_while_lending ${device} [=[lender->holds_all() ?]=] [=[lender->holds_all() || MUTANT ?]=])
# A lane's calls count as made during another thread's capture.
sida_mutation(captures_spoiled ${device} [=[slots.use_device_on_lane();]=] [=[slots.use_device();]=])

# Kernels do not wait for copies at all.
sida_mutation(no_before_read ${serving} [=[slots.before_read(layer.stream, wave.slots);]=] [=[]=])
# Kernels go to the default stream.
sida_mutation(kernels_default_stream ${serving} [=[launch(args, layer.stream);]=]
  [=[launch(args, MUTANT ? nullptr : layer.stream);]=])
# The event is recorded on another stream than the kernels'.
sida_mutation(other_stream_read ${serving} [=[if (readers == nullptr) readers = slots.after_read(layer.stream,]=]
  [=[if (readers == nullptr) readers = slots.after_read(MUTANT ? nullptr : layer.stream,]=])
sida_mutation(other_stream_read ${serving}
  [=[: layer.stream);
      readers = slots.after_read(layer.stream,]=]
  [=[: layer.stream);
      readers = slots.after_read(MUTANT ? nullptr : layer.stream,]=])
# The event is recorded before the kernels are launched.
sida_mutation(after_read_early ${serving}
  [=[: layer.stream);
      readers = slots]=]
  [=[: layer.stream);
      if (!MUTANT || readers == nullptr) readers = slots]=])
sida_mutation(after_read_early ${serving} [=[launch(args,]=]
  [=[if (MUTANT) readers = slots.after_read(layer.stream, wave.slots);
      launch(args,]=])
# Slots are released without an event behind the kernels.
sida_mutation(no_after_read ${serving} [=[if (readers == nullptr) readers =]=]
  [=[if (readers == nullptr && !MUTANT) readers =]=])
sida_mutation(no_after_read ${serving} [=[|| readers == nullptr) readers =]=]
  [=[|| readers == nullptr) if (!MUTANT) readers =]=])
# The slots are released before the kernels are launched.
sida_mutation(released_early ${serving} [=[engine_->release(demand, wave);]=]
  [=[if (!MUTANT) engine_->release(demand, wave);]=])
sida_mutation(released_early ${serving} [=[Staging& staging = take_staging(args.num_experts);]=]
  [=[if (MUTANT) engine_->release(demand, wave);
    Staging& staging = take_staging(args.num_experts);]=])
# The host reads the experts' indices before they have arrived.
sida_mutation(index_unwaited ${serving}
  [=[check(runtime_.event_synchronize(staging.event), "the work before a layer's expert indices");]=] [=[]=])
# A staging buffer is written again while a copy reads it.
sida_mutation(staging_reused ${serving} [=[one->readers == nullptr;]=] [=[one->readers == nullptr || MUTANT;]=])

sida_write_mutants()
