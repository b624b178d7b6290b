"""The configuration of the test cluster."""

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster

SLURM_CONF = """
ClusterName=longhaul
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job may start when its old credential has expired: 120 s by default, 5 is the least that is accepted
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
# cgroup, as on production clusters: a signal reaches the tasks that srun started, not their children
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# nodes may claim more processors than the machine has
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
{user_signal}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
OverTimeLimit=0
MinJobAge=3600
CompleteWait=0
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
BatchStartTimeout=10
MessageTimeout=5
{nodes}
PartitionName=main  Nodes=ALL Default=YES State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=30
PartitionName=abrupt Nodes=ALL            State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=0
PartitionName=high  Nodes=ALL             State=UP PriorityTier=10 PreemptMode=OFF
"""
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


def write_cluster_files(cluster: "Cluster") -> None:
    """slurm.conf, cgroup.conf, and each machine's /etc/hosts, below the cluster's folder."""
    folder = cluster.folder
    for name in ("etc", "run", "log", "state", "munge"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "munge").chmod(0o700)
    (folder / "etc" / "cgroup.conf").write_text(CGROUP_CONF)
    write_slurm_conf(cluster)
    names = ["127.0.0.1 localhost", f"{_controller_address(cluster)} ctl"]
    names += [f"{cluster.address(node)} {node}" for node in cluster.nodes]
    (folder / "etc" / "hosts").write_text("\n".join(names) + "\n")
    for node in cluster.nodes:
        own = f"127.0.1.1 host-{cluster.number(node)}"
        (folder / "etc" / f"hosts-{node}").write_text("\n".join([*names, own]) + "\n")


def write_slurm_conf(cluster: "Cluster", *, user_signal: bool = True) -> None:
    """`user_signal`: whether pre-emption with grace sends the signal that the job asked for, or only SIGTERM."""
    host = "ctl" if cluster.isolated else socket.gethostname().split(".")[0]
    lines = []
    for node in cluster.nodes:
        port = cluster.port + (1 if cluster.isolated else cluster.number(node))
        own = "" if cluster.isolated else f"NodeHostname={host} "
        lines.append(f"NodeName={node} {own}NodeAddr={cluster.address(node)} Port={port} CPUs=4 RealMemory=8000")
    text = SLURM_CONF.format(
        controller=f"{host}({_controller_address(cluster)})",
        port=cluster.port,
        folder=cluster.folder,
        tracking=cluster.tracking,
        user_signal="SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
        nodes="\n".join(lines),
    )
    (cluster.folder / "etc" / "slurm.conf").write_text(text)


def _controller_address(cluster: "Cluster") -> str:
    return "10.77.0.1" if cluster.isolated else "127.0.0.1"
