"""Steps that are captured once and replayed: decode and prefill graphs on a GPU, recorded calls on a CPU."""
