"""Web pages to text, in a separate process with limits on structure, memory and time. Imports nothing heavy."""
