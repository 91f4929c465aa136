"""Every Python that a test starts reads this first: while it imports, it seldom looks through all objects for garbage.

PyTorch, Lightning and what they bring make half a million objects that stay; looking through them is a sixth of the
processor time of `import cxr_lab.train`. Young objects are looked through as often as ever."""
import gc

gc.set_threshold(*gc.get_threshold()[:2], 1000)
