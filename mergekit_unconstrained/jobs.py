

def run(run_merge, config, out_path, options, source=None):
    from mergekit_unconstrained import compat

    compat.get(config.merge_method)
    return run_merge(config, out_path, options, source)
