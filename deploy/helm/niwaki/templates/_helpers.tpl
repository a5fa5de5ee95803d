{{- define "niwaki.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "niwaki.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "niwaki.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "niwaki.selectorLabels" -}}
app.kubernetes.io/name: {{ include "niwaki.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "niwaki.labels" -}}
{{ include "niwaki.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "niwaki.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "niwaki.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "niwaki.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Probes and scrapes speak what the ports speak. */}}
{{- define "niwaki.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") }}
{{- end }}

{{/* Flags of `niwaki serve`; those that are null are left to the program. */}}
{{- define "niwaki.args" -}}
- serve
- --port={{ .Values.server.port }}
{{- with .Values.server.grpcPort }}
- --grpc-port={{ . }}
{{- end }}
{{- with .Values.server.adminPort }}
- --prometheus-port={{ . }}
{{- end }}
{{- if and .Values.auth.existingSecret .Values.auth.file }}
- --api-key-file=/keys/{{ .Values.auth.key }}
{{- end }}
{{- if .Values.tls.existingSecret }}
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- end }}
- --shutdown-grace={{ .Values.server.shutdownGraceSeconds }}
- --json-output={{ .Values.server.jsonOutput }}
{{- with .Values.model.id }}
- --model-id={{ . }}
- --revision={{ $.Values.model.revision }}
{{- end }}
{{- if .Values.model.artefactClaim }}
- --model={{ printf "/model/%s" .Values.model.artefactPath | trimSuffix "/" }}
{{- end }}
{{- range $flag, $value := dict
  "max-concurrent-requests" .Values.server.maxConcurrentRequests
  "max-queue-tokens" .Values.server.maxQueueTokens
  "max-batch-tokens" .Values.server.maxBatchTokens
  "max-client-batch-size" .Values.server.maxClientBatchSize
  "default-timeout-ms" .Values.server.defaultTimeoutMs }}
{{- if not (kindIs "invalid" $value) }}
- --{{ $flag }}={{ $value | int64 }}
{{- end }}
{{- end }}
{{- with .Values.server.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}
