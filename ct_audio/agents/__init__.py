"""Reinforcement learning: an agent whose memory is a stack of `models/`, learnt by V-trace from what actors do."""
