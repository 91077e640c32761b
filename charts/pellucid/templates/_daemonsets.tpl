{{/* The DaemonSets as the operator gets them: it adds namespace, owner, and what TransparentProxy default says. */}}
{{- define "pellucid.node" -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: pellucid-node
  labels:
    {{- include "pellucid.labels" . | nindent 4 }}
    app.kubernetes.io/component: node
spec:
  selector: {matchLabels: {app.kubernetes.io/name: pellucid, app.kubernetes.io/component: node}}
  minReadySeconds: 1
  updateStrategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  template:
    metadata:
      labels: {app.kubernetes.io/name: pellucid, app.kubernetes.io/component: node}
    spec:
      serviceAccountName: pellucid-node
      hostNetwork: true  # and no ports: they would be the host's, and two pods of an upgrade could not run side by side
      dnsPolicy: Default
      priorityClassName: system-node-critical
      terminationGracePeriodSeconds: {{ .Values.agent.terminationGracePeriodSeconds }}
      tolerations: {{ .Values.agent.tolerations | toJson }}
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets: {{ toJson . }}
      {{- end }}
      containers:
      - name: pellucid
        image: {{ include "pellucid.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        args:
        - run
        - --cluster
        - --takeover
        - --node=$(NODE_NAME)
        - --handover-drain={{ .Values.agent.terminationGracePeriodSeconds }}
        - --log-level={{ .Values.agent.logLevel }}
        {{- with .Values.agent.metrics }}
        - --metrics={{ . }}
        {{- end }}
        {{- if .Values.agent.flowLogs }}
        - --flows=-
        {{- end }}
        env:
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: PELLUCID_INSTANCE, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        - {name: PELLUCID_DAEMONSET, value: pellucid-node}
        - {name: PELLUCID_STATE, value: /var/lib/pellucid}
        {{- with .Values.agent.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        securityContext:
          runAsUser: 0
          runAsGroup: 0
          readOnlyRootFilesystem: true
          seccompProfile: {type: RuntimeDefault}
          {{- if .Values.agent.privileged }}
          privileged: true
          {{- else }}
          capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETPCAP, SETUID, SETGID, KILL]}
          {{- end }}
        # Ready: this pod enforces, and not the one before it. Alive: somebody answers; a bad policy is no reason to start again.
        startupProbe: {exec: {command: [pellucid, status, --ready]}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 300}
        readinessProbe: {exec: {command: [pellucid, status, --ready]}, periodSeconds: 10, timeoutSeconds: 10}
        resources: {{ toJson .Values.agent.resources }}
        volumeMounts: [{name: state, mountPath: /var/lib/pellucid}, {name: tmp, mountPath: /tmp}]
      volumes:
      - {name: state, hostPath: {path: /var/lib/pellucid, type: DirectoryOrCreate}}
      - {name: tmp, emptyDir: {sizeLimit: 16Mi}}
{{- end }}

{{- define "pellucid.canary" -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: pellucid-canary
  labels:
    {{- include "pellucid.labels" . | nindent 4 }}
    app.kubernetes.io/component: canary
spec:
  selector: {matchLabels: {app.kubernetes.io/name: pellucid, app.kubernetes.io/component: canary}}
  template:
    metadata:
      labels: {app.kubernetes.io/name: pellucid, app.kubernetes.io/component: canary}
    spec:
      serviceAccountName: pellucid-canary
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 1
      tolerations: {{ .Values.agent.tolerations | toJson }}
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets: {{ toJson . }}
      {{- end }}
      containers:
      - name: canary
        image: {{ include "pellucid.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        args: [canary]
        securityContext: {{- include "pellucid.harmless" . | nindent 10 }}
        resources: {{ toJson .Values.canary.resources }}
{{- end }}

{{/* Not an object of the release itself: helm knows no kind that the same release brings. */}}
{{- define "pellucid.proxy" -}}
apiVersion: pellucid.dev/v1alpha1
kind: TransparentProxy
metadata:
  name: default
  labels:
    {{- include "pellucid.labels" . | nindent 4 }}
spec: {{ .Values.proxy.spec | toJson }}
{{- end }}
