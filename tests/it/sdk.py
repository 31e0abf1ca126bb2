"""All five calls of the contract with the public SDK, as its users write them.

usage: sdk.py ENDPOINT INSTANCE PROJECT AK SK [TOKEN]

With a TOKEN the calls carry X-Auth-Token and no signature. Prints one JSON object of what was seen.
"""

import json
import sys
import time

from huaweicloudsdkcore.auth import credentials
from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException
from huaweicloudsdkdcs.v2 import DcsClient
from huaweicloudsdkdcs.v2 import model as m

endpoint, instance, project, ak, sk = sys.argv[1:6]
token = sys.argv[6] if len(sys.argv) > 6 else None


class BasicCredentials(credentials.BasicCredentials):
    """Sends the token in place of a signature. The client accepts credentials by the name of their class."""

    def sign_request(self, *args):
        request = super().sign_request(*args)
        for name in ("Authorization", "X-Sdk-Date"):
            request.header_params.pop(name, None)
        request.header_params["X-Auth-Token"] = token
        return request


kind = BasicCredentials if token else credentials.BasicCredentials
client = DcsClient.new_builder().with_credentials(kind(ak, sk, project)).with_endpoint(endpoint).build()
seen = {}

created = client.create_auto_expire_scan_task(m.CreateAutoExpireScanTaskRequest(instance_id=instance))
seen["created"] = created.to_dict()


def history(**options):
    return client.show_expire_key_scan_info(m.ShowExpireKeyScanInfoRequest(instance_id=instance, **options))


def wait(task_id):
    for _ in range(600):
        page = history(offset=0, limit=10)
        record = next(record for record in page.records if record.id == task_id)
        if record.status in ("success", "failed"):
            return page
        time.sleep(0.05)
    raise SystemExit("the scan does not end")


seen["first"] = wait(created.id).to_dict()
again = client.scan_expire_key(m.ScanExpireKeyRequest(instance_id=instance))
seen["again"] = again.to_dict()
seen["second"] = wait(again.id).to_dict()
seen["filtered"] = history(status="success", limit=1).to_dict()

body = m.UpdateAutoScanConfigRequestBody(
    enable_auto_scan=True, first_scan_at="2999-01-01T00:00:00.000Z", interval=3600, timeout=7200, scan_keys_count=20
)
request = m.UpdateExpireAutoScanConfigRequest(instance_id=instance, body=body)
seen["set"] = client.update_expire_auto_scan_config(request).to_dict()
shown = client.show_expire_auto_scan_config(m.ShowExpireAutoScanConfigRequest(instance_id=instance))
seen["shown"] = shown.to_dict()

try:
    client.create_auto_expire_scan_task(m.CreateAutoExpireScanTaskRequest(instance_id="no-such-instance"))
except ClientRequestException as error:
    seen["error"] = [error.status_code, error.error_code, error.error_msg, bool(error.request_id)]

print(json.dumps(seen, default=str))
