"""The stages: each binds one network to the maths (init, loss, sample), as pure functions."""
