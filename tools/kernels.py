"""Jupyter's kernels, forked from a process that has TensorFlow loaded."""


from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from .forked import FORKS, Forked


class Fork(LocalProvisioner):
    """Starts a kernel by a fork."""

    async def launch_kernel(self, cmd, *, env=None, cwd=None, **_):
        self.process = Forked(cmd[cmd.index("-m") :], env=env, cwd=cwd)
        self.pid = self.pgid = self.process.pid
        self.cwd = cwd
        return self.connection_info


class Manager(AsyncKernelManager):
    """Jupyter's manager of a kernel, which is forked where that is safe."""

    async def _async_pre_start_kernel(self, **how):
        if self.provisioner is None and FORKS:
            self.provisioner = Fork(kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**how)
