"""Once timm is imported, import timm_epfs. ``timm-epfs autoload on`` puts this text into the environment's start-up.

It runs before every program of the environment: it imports nothing but ``sys``, and lets nothing go wrong.
"""
import sys


def is_ours(finder):
    return getattr(finder, '__name__', None) == 'ImportTimmEpfsAfterTimm'


class ImportTimmEpfsAfterTimm:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != 'timm':
            return None
        for finder in list(sys.meta_path):
            search = None if is_ours(finder) else getattr(finder, 'find_spec', None)
            spec = search(name, path, target) if search else None
            if spec is not None:
                cls.follow(spec.loader)
                return spec
        return None

    @staticmethod
    def follow(loader):
        def exec_module(module):
            run(module)
            try:
                import timm_epfs  # noqa: F401
            except Exception as e:
                if not (isinstance(e, ModuleNotFoundError) and e.name == 'timm_epfs'):  # it was uninstalled
                    import logging
                    logging.getLogger('timm_epfs').warning('not loaded with timm: %s: %s', type(e).__name__, e)

        try:
            run = loader.exec_module
            loader.exec_module = exec_module
        except AttributeError:
            pass


if not any(map(is_ours, sys.meta_path)):  # Python reads a virtual environment's .pth files twice
    sys.meta_path.insert(0, ImportTimmEpfsAfterTimm)
