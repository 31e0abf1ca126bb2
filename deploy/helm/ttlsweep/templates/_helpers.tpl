{{/* The name of everything: the release's, with the chart's where it is not in it. */}}
{{- define "ttlsweep.fullname" -}}
{{- if contains "ttlsweep" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-ttlsweep" (.Release.Name | trunc 31 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* What tells the pods of this release from others. A scan's are not the daemon's. */}}
{{- define "ttlsweep.selector" -}}
app.kubernetes.io/name: ttlsweep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ttlsweep.labels" -}}
{{ include "ttlsweep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "ttlsweep.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* What the pods of the daemon and of the scans have in common. */}}
{{- define "ttlsweep.pod" -}}
serviceAccountName: {{ include "ttlsweep.fullname" . }}
# It asks nothing of Kubernetes.
automountServiceAccountToken: false
enableServiceLinks: false
# A server that is frozen just then is given up after response-timeout, 30 s.
terminationGracePeriodSeconds: 60
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "ttlsweep.container" -}}
name: ttlsweep
image: {{ include "ttlsweep.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  privileged: false
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* The settings file of the daemon. */}}
{{- define "ttlsweep.settings" -}}
[api]
listen = "0.0.0.0:8080"
{{- if .Values.daemon.tlsSecret }}
tls-cert = "/run/secrets/tls/tls.crt"
tls-key = "/run/secrets/tls/tls.key"
{{- end }}

[store]
{{- if .Values.daemon.postgres.url }}
url = {{ .Values.daemon.postgres.url | quote }}
{{- with .Values.daemon.postgres.passwordKey }}
password-file = "/run/secrets/ttlsweep/{{ . }}"
{{- end }}
journal = "/var/lib/ttlsweep/tally"
{{- else }}
path = "/var/lib/ttlsweep/ttlsweep.db"
{{- end }}

{{ .Values.daemon.settings }}
{{- end -}}
