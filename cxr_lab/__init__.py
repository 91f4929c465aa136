__version__ = "0.1.0"

from .edits import start

start()
