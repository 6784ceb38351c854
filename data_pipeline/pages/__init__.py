"""Web pages to text, in a process of its own with bounds of structure, memory and time. Imports nothing heavy."""
