"""Imported by every Python that has this folder on its PYTHONPATH: see launch/soak/agent.py."""

from launch.soak.agent import listen

listen()
