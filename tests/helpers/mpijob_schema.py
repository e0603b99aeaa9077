"""What an MPIJob of kubeflow.org/v2beta1 may hold, as far as ours goes.

Written after the operator's published CustomResourceDefinition (manifests/base/kubeflow.org_mpijobs.yaml); objects are
closed, so that a misspelt key fails, which the API server would silently drop.
"""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
_TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": _TEXT}
_QUANTITY: dict[str, Any] = {"type": ["string", "integer"], "pattern": r"^[0-9.]+(m|[kMGTPE]i?)?$"}
_PORT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 65535}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
_CONTAINER = _closed(
    ("name", "image"),
    name=_TEXT,
    image=_TEXT,
    command=_list(_TEXT),
    args=_list(_TEXT),
    env=_list(_closed(("name",), name=_TEXT, value=_TEXT)),
    ports=_list(_closed(("containerPort",), containerPort=_PORT)),
    readinessProbe=_closed(tcpSocket=_closed(("port",), port=_PORT), initialDelaySeconds=_WHOLE, periodSeconds=_WHOLE),
    lifecycle=_closed(preStop=_closed(exec=_closed(command=_list(_TEXT)))),
    resources=_closed(requests=_QUANTITIES, limits=_QUANTITIES),
    volumeMounts=_list(_closed(("name", "mountPath"), name=_TEXT, mountPath=_TEXT, readOnly={"type": "boolean"})),
)
_ANTI_AFFINITY = _closed(
    requiredDuringSchedulingIgnoredDuringExecution=_list(
        _closed(("topologyKey",), topologyKey=_TEXT, labelSelector=_closed(matchLabels=_TEXTS))
    )
)
_POD = _closed(
    ("containers",),
    terminationGracePeriodSeconds=_WHOLE,
    securityContext=_closed(runAsUser=_WHOLE, fsGroup=_WHOLE),
    affinity=_closed(podAntiAffinity=_ANTI_AFFINITY),
    nodeSelector=_TEXTS,
    containers=_list(_CONTAINER),
    volumes=_list(
        _closed(
            ("name",),
            name=_TEXT,
            hostPath=_closed(("path",), path=_TEXT, type=_TEXT),
            emptyDir=_closed(medium=_TEXT, sizeLimit=_QUANTITY),
            persistentVolumeClaim=_closed(("claimName",), claimName=_TEXT, readOnly={"type": "boolean"}),
        )
    ),
)
_REPLICAS = _closed(
    replicas=_WHOLE,
    restartPolicy={"enum": ["Never", "OnFailure", "Always", "ExitCode"]},
    template=_closed(metadata=_closed(labels=_TEXTS, annotations=_TEXTS), spec=_POD),
)
MPIJOB = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata=_closed(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS),
    spec=_closed(
        ("mpiReplicaSpecs",),
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        runLauncherAsWorker={"type": "boolean"},
        slotsPerWorker=_WHOLE,
        sshAuthMountPath=_TEXT,
        runPolicy=_closed(
            activeDeadlineSeconds=_WHOLE,
            backoffLimit=_WHOLE,
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            suspend={"type": "boolean"},
            ttlSecondsAfterFinished=_WHOLE,
        ),
        mpiReplicaSpecs=_closed(("Launcher", "Worker"), Launcher=_REPLICAS, Worker=_REPLICAS),
    ),
)
