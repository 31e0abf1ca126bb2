{{/* The name of all objects: the name of the release, followed by that of the chart unless it is contained. */}}
{{- define "ttlsweep.fullname" -}}
{{- if contains "ttlsweep" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-ttlsweep" (.Release.Name | trunc 31 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* The labels that select the pods of this release; those of scans and of the daemon differ. */}}
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

{{/* The part of the pod spec that the daemon and the scans share. */}}
{{- define "ttlsweep.pod" -}}
serviceAccountName: {{ include "ttlsweep.fullname" . }}
# The program does not call the Kubernetes API.
automountServiceAccountToken: false
enableServiceLinks: false
# For a server that does not answer just then the program waits for response-timeout, 30 s.
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

{{/* The text of the daemon's settings file. */}}
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
